"""The console in a real browser: keys, hostile names, failures, and whether everybody can use it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Page, expect

from contracts.rollout import Phase
from serve.state.keys import KeyState, new_key
from tests.integration.console_rig import ConsoleStack, Watched, active, phase, ramping, watch
from tests.integration.router_rig import wait_until
from tests.unit.rollout_world import BROKEN, GOOD

pytestmark = [pytest.mark.integration, pytest.mark.browser]
SLOW_MS = 30_000


# keys and safety --------------------------------------------------------------------------------


def test_the_key_is_asked_for_once_and_forgotten_on_the_way_out(
    console: ConsoleStack, watched: Watched
) -> None:
    """A wrong key is refused in words; a right one survives a reload of this tab only; log out ends it."""
    page = watched.open()
    watched.refusals_expected = True
    for key, says in (
        ("", "Enter an admin key."),
        ("sk-sh-wrong", "unknown, disabled or expired"),
        ("a ключ", "no spaces"),
    ):
        page.get_by_label("Admin key").fill(key)
        page.get_by_role("button", name="Log in").click()
        expect(page.locator("#login-error")).to_contain_text(says)
        assert active(page) == "login-key"
    plain, secret = new_key("plain")
    KeyState(console.engine).create_key(plain)
    page.get_by_label("Admin key").fill(secret)
    page.keyboard.press("Enter")
    expect(page.locator("#login-error")).to_have_text("This API key is not an admin key.")
    page.get_by_label("Admin key").fill(console.key)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Routes")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="Routes")).to_be_visible()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Admin key")).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.locator("#view").inner_text() == ""
    page.reload()
    expect(page.get_by_label("Admin key")).to_be_visible()


def test_a_key_that_is_disabled_ends_the_session(own_console: ConsoleStack, browser: Browser) -> None:
    """Nothing stays on the screen of somebody who may no longer see it."""
    own_console.route("secret-route")
    watched = watch(browser, own_console)
    page = watched.log_in()
    expect(page.get_by_text("secret-route")).to_be_visible()
    watched.refusals_expected = True
    KeyState(own_console.engine).change_key(own_console.key_id, disabled=True)
    expect(page.locator("#login-error")).to_contain_text("disabled or expired", timeout=SLOW_MS)
    expect(page.get_by_text("secret-route")).to_have_count(0)
    watched.check()
    page.context.close()


def test_names_are_text_whatever_they_say(console: ConsoleStack, watched: Watched) -> None:
    """Markup in a model's name, a person's name, a reason: shown letter by letter, never run."""
    evil = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>\"'&lt;"
    rollout_id = ramping(console, "hostile", model_ref=f"{evil}:1", created_by=evil)
    console.rollouts.add_command(rollout_id, "pause", evil, evil)
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    expect(page.locator(".hero .reason")).to_have_text(f"paused by {evil}: {evil}", timeout=SLOW_MS)
    expect(page.locator("#title")).to_have_text(f"hostile ← {evil}:1")
    page.get_by_role("button", name="promote").click()
    expect(page.get_by_role("dialog")).to_contain_text(f"{evil}:1.")
    page.keyboard.press("Escape")
    page.get_by_role("link", name="History").click()
    expect(page.get_by_role("row", name=re.compile("hostile"))).to_contain_text(evil)
    console.rollouts.add_command(rollout_id, "abort", evil)
    expect(page.locator("#toasts")).to_contain_text("hostile: aborted", timeout=SLOW_MS)
    assert page.evaluate("window.pwned") is None
    assert page.locator("#view img, #view script, #toasts img").count() == 0


def test_the_browser_enforces_the_policy(console: ConsoleStack, watched: Watched) -> None:
    """Even somebody who got code in could not build HTML, load a script or talk to another server."""
    page = watched.log_in()
    with pytest.raises(Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    away = "fetch('http://127.0.0.2:9/').then(() => 'sent', (e) => e.name)"
    assert page.evaluate(away) == "TypeError"
    blocked = [s for s in watched.said if "Content Security Policy" in s or "TrustedHTML" in s]
    assert any("connect-src" in s for s in blocked)
    watched.said = [s for s in watched.said if s not in blocked]
    watched.asked = [u for u in watched.asked if "127.0.0.2" not in u]


def test_without_keys_nobody_is_asked_for_one(browser: Browser, own_console: ConsoleStack) -> None:
    """--insecure on loopback: the console opens at once, and says who asked as 'nobody'."""
    rollout_id = ramping(own_console, "open")
    own_console.admin.stop()
    own_console.admin = own_console.start_admin("--insecure")
    watched = watch(browser, own_console)
    page = watched.open(f"#/rollouts/{rollout_id}")
    page.get_by_role("button", name="pause").click()
    page.keyboard.press("Enter")
    expect(page.locator(".hero .reason")).to_have_text("paused by nobody", timeout=SLOW_MS)
    expect(page.get_by_role("button", name="Log out")).to_be_hidden()
    watched.check()
    page.context.close()


# when things fail -------------------------------------------------------------------------------


def test_old_data_is_called_old_until_the_server_is_back(own_console: ConsoleStack, browser: Browser) -> None:
    """Server gone, then store gone: a banner says which, nothing can be asked, and it heals by itself."""
    rollout_id = ramping(own_console, "steady")
    watched = watch(browser, own_console)
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    expect(page.locator("#connection-text")).to_have_text("Live")
    expect(phase(page)).to_have_text("ramping")  # live comes first: nothing shown yet cannot be old
    watched.refusals_expected = True
    own_console.admin.stop()
    banner = page.locator("#banner")
    expect(banner).to_have_text(
        "The admin server does not answer. What you see is old; trying again.", timeout=SLOW_MS
    )
    assert banner.get_attribute("role") == "alert"
    expect(page.locator("#connection-text")).to_have_text(re.compile(r"^Stale, \d+ s$"))
    expect(page.get_by_role("button", name="pause")).to_have_attribute("aria-disabled", "true")
    expect(phase(page)).to_have_text("ramping")
    own_console.admin = own_console.start_admin()
    expect(banner).to_be_hidden(timeout=SLOW_MS)
    expect(page.get_by_role("button", name="pause")).not_to_have_attribute("aria-disabled", "true")
    with own_console.paused():
        with own_console.engine.begin() as db:
            db.exec_driver_sql("ALTER TABLE splits RENAME TO elsewhere")
        expect(banner).to_contain_text("The state store cannot be reached at the moment.", timeout=SLOW_MS)
        with own_console.engine.begin() as db:
            db.exec_driver_sql("ALTER TABLE elsewhere RENAME TO splits")
    expect(banner).to_be_hidden(timeout=SLOW_MS)
    watched.check()
    page.context.close()


# for everybody ----------------------------------------------------------------------------------


AUDIT = (Path(__file__).parent / "console_audit.js").read_text(encoding="utf-8")


def audit(page: Page, where: str) -> None:
    """Names, roles, headings, references and contrast of what is shown now."""
    found = page.evaluate(f"({AUDIT})()")
    assert found["wrong"] == [], where
    assert found["texts"] > 5, where


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_named_ordered_and_readable(
    own_console: ConsoleStack, browser: Browser, scheme: str
) -> None:
    """Names, roles, one h1, no skipped level, and 4.5 : 1 for every visible text, in both schemes."""
    own_console.route("plain")
    kept, harmed = ramping(own_console, "kept"), ramping(own_console, "harmed")
    watched = watch(browser, own_console, color_scheme=scheme, reduced_motion="reduce")
    page = watched.open()
    audit(page, "login")
    page.get_by_label("Admin key").fill("x y")
    page.keyboard.press("Enter")
    audit(page, "login refused")
    page = watched.log_in()
    page.get_by_role("article", name="Rollout of kept").wait_for()
    audit(page, "overview")
    page.goto(f"{own_console.console}#/rollouts/{kept}")
    page.get_by_role("meter").first.wait_for()
    audit(page, "rollout")
    assert page.evaluate("document.getAnimations().length") == 0
    for verb in ("pause", "abort"):
        page.get_by_role("button", name=verb).click()
        page.keyboard.press("Enter" if verb == "abort" else "End")
        audit(page, f"dialog {verb}")
        page.keyboard.press("Escape")
    own_console.rollouts.add_command(kept, "pause", "ann")
    own_console.canary = BROKEN
    wait_until(
        "it is thrown back", lambda: own_console.rollouts.get(harmed).status.phase is Phase.ROLLED_BACK
    )
    own_console.canary = GOOD
    page.goto(f"{own_console.console}#/rollouts/{harmed}")
    expect(phase(page)).to_have_text("rolled back", timeout=SLOW_MS)
    audit(page, "rolled back")
    page.goto(f"{own_console.console}#/history")
    page.get_by_role("row").nth(2).wait_for()
    audit(page, "history")
    ramping(own_console, "standing")
    with own_console.paused():
        expect(page.locator("#banner")).to_contain_text("No controller is acting", timeout=SLOW_MS)
        audit(page, "banner")
    watched.check()
    page.context.close()


def test_a_phone_shows_everything_without_scrolling_sideways(console: ConsoleStack, browser: Browser) -> None:
    """380 pixels: cards instead of columns, and tables that are still tables for a screen reader."""
    rollout_id = ramping(console, "small")
    watched = watch(browser, console, width=380)
    page = watched.log_in()
    for path, heading in (
        ("#/", "Overview"),
        (f"#/rollouts/{rollout_id}", "small ← student:1"),
        ("#/history", "History"),
    ):
        page.goto(console.console + path)
        expect(page.get_by_role("heading", name=heading, level=1)).to_have_count(1)
        page.get_by_role("table").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 380, path
    row = page.get_by_role("row", name=re.compile("small"))
    assert row.get_by_role("rowheader").count() == 1
    assert row.get_by_role("cell").count() == 6
    console.rollouts.add_command(rollout_id, "abort", "ann")
    watched.check()
    page.context.close()
