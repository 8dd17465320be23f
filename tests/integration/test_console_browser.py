"""The console in a real browser: what is seen, steered by keyboard, refused, and never asked of anybody else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Locator, Page, expect

from contracts.rollout import Phase
from contracts.traffic import Upstream
from serve.state.keys import KeyState, new_key
from tests.integration.console_rig import ConsoleStack, Watched, chromium, slow_policy
from tests.integration.router_rig import wait_until
from tests.unit.rollout_world import BROKEN, GOOD

pytestmark = [pytest.mark.integration, pytest.mark.browser]
AUDIT = (Path(__file__).parent / "audit.js").read_text(encoding="utf-8")
SLOW_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleStack]:
    """One admin process and controller for all tests; each test has routes of its own."""
    made = ConsoleStack(tmp_path_factory.mktemp("console"))
    yield made
    made.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ConsoleStack]:
    """A stack for a test that breaks it."""
    made = ConsoleStack(tmp_path)
    yield made
    made.close()


def watch(browser: Browser, stack: ConsoleStack, width: int = 1280, **options: object) -> Watched:
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)  # type: ignore[arg-type]
    context.set_default_timeout(SLOW_MS)
    return Watched(context.new_page(), stack)


@pytest.fixture
def watched(browser: Browser, live: ConsoleStack) -> Iterator[Watched]:
    """A page that must say nothing on its console and talk to its server only."""
    made = watch(browser, live)
    yield made
    made.check()
    made.page.context.close()


def ramping(live: ConsoleStack, route: str, **changes: object) -> str:
    """A rollout on its second step, where it stays; its id."""
    live.route(route)
    spec = live.start(route, **changes)
    wait_until("it ramps", lambda: live.rollouts.get(spec.id).status.step == 1)
    return spec.id


def phase(page: Page) -> Locator:
    """The chip in the rollout's heading."""
    return page.locator(".hero .chip")


def active(page: Page) -> str:
    """What has the focus, in words."""
    return str(page.evaluate("(document.activeElement.id || document.activeElement.textContent).trim()"))


def tab_to(page: Page, name: str) -> None:
    """Press Tab until it is there, as somebody without a mouse."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if active(page) == name:
            return
    raise AssertionError(f"Tab never reached {name!r}")


def commands(live: ConsoleStack, rollout_id: str) -> list[str]:
    """What the audit trail says was asked, and what is still waiting."""
    waiting = [c.verb for c in live.rollouts.pending_commands(rollout_id)]
    trail = live.rollouts.audit(rollout_id)
    done = [c["verb"] for e in trail for c in e.body.get("observation", {}).get("commands", [])]
    return done + waiting


# seeing -----------------------------------------------------------------------------------------


def test_what_happens_is_seen_without_a_reload(live: ConsoleStack, watched: Watched) -> None:
    """Routes, a new rollout, its phases and its end come by themselves, and are announced politely."""
    live.route("seen")
    page = watched.log_in()
    row = page.get_by_role("row", name=re.compile("seen"))
    expect(row).to_contain_text("2 of 2 on split 1", timeout=SLOW_MS)
    spec = live.start("seen")
    card = page.get_by_role("article", name="Rollout of seen")
    expect(card).to_contain_text("ramping", timeout=SLOW_MS)
    expect(card.locator('[aria-current="step"]')).to_have_text(re.compile("20 %"), timeout=SLOW_MS)
    expect(row.get_by_role("img")).to_have_attribute(
        "aria-label", "20 % to canary student-v1, 80 % to stable big-teacher"
    )
    live.rollouts.add_command(spec.id, "pause", "ann", "by the terminal")
    expect(card.locator(".chip")).to_have_text("paused", timeout=SLOW_MS)
    expect(page.locator("#toasts")).to_contain_text("seen: ramping → paused")
    assert page.locator("#toasts").get_attribute("aria-live") == "polite"
    live.rollouts.add_command(spec.id, "abort", "ann")
    expect(card).to_have_count(0, timeout=SLOW_MS)
    expect(page.locator("#toasts")).to_contain_text("seen: aborted", timeout=SLOW_MS)
    assert [u for u in watched.asked if u.endswith("/console")] == [live.console]


def test_evidence_is_drawn_as_the_controller_stored_it(live: ConsoleStack, watched: Watched) -> None:
    """Each metric's two tests against what decides, counts by arm, and a curve over the looks."""
    rollout_id = ramping(live, "drawn")
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    quality = page.get_by_role("region", name="Evidence on quality")
    harm = quality.get_by_role("meter", name="Harm → roll back")
    expect(harm).to_have_attribute("aria-valuetext", re.compile(r"^e = .+ of 60$"), timeout=SLOW_MS)
    assert harm.get_attribute("aria-valuemax") == "4.094"  # log(3 metrics / alpha 0.05)
    good = quality.get_by_role("meter", name="No worse → promote")
    expect(good).to_have_attribute("aria-valuetext", re.compile(r"of 20; this step needs 4\.5$"))
    expect(quality.get_by_role("img")).to_have_attribute("aria-label", re.compile(r"^quality over \d+ looks"))
    counts = page.get_by_role("table", name="Counts by arm")
    shown = int(counts.get_by_role("row", name=re.compile("canary")).get_by_role("cell").first.inner_text())
    assert 0 < shown <= live.rollouts.get(rollout_id).status.total_counts["canary"].n
    live.rollouts.add_command(rollout_id, "abort", "ann")


def test_a_harmful_student_is_seen_to_be_thrown_back(own: ConsoleStack, browser: Browser) -> None:
    """The sentence, the verdict at its metric and the trail say why, without anybody having reloaded."""
    rollout_id = ramping(own, "harmed")
    watched = watch(browser, own)
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    expect(phase(page)).to_have_text("ramping")
    own.canary = BROKEN
    expect(phase(page)).to_have_text("rolled back", timeout=SLOW_MS)
    expect(page.locator(".hero .reason")).to_contain_text("quality: canary got")
    expect(page.get_by_role("region", name="Evidence on quality").locator(".chip")).to_have_text("harm")
    expect(page.locator(".timeline li").first).to_contain_text("rolling back → rolled back")
    expect(page.get_by_role("group", name="Commands")).to_have_count(0)
    watched.check()
    page.context.close()


def test_two_hundred_routes_are_searched_not_scrolled(own: ConsoleStack, browser: Browser) -> None:
    """The first fifty are shown; typing finds any by name or upstream, and keeps what was typed through updates."""
    for i in range(200):
        own.route(f"route-{i:03}", Upstream(name=f"teacher-{i % 7}", model="m", url="http://127.0.0.1:9"))
    watched = watch(browser, own)
    page = watched.log_in()
    rows = page.locator("#view tbody tr")
    expect(rows).to_have_count(50, timeout=SLOW_MS)
    search = page.get_by_label("Search routes")
    search.press_sequentially("route-19")
    expect(rows).to_have_count(10)
    expect(page.get_by_text("10 of 200")).to_be_visible()
    own.traffic.put_split(own.traffic.splits()["route-190"].model_copy(update={"version": 2}))
    expect(page.get_by_role("row", name=re.compile("route-190"))).to_contain_text(
        "on split 2", timeout=SLOW_MS
    )
    assert (search.input_value(), active(page)) == ("route-19", "search")
    search.fill("TEACHER-3")
    expect(rows).to_have_count(29)
    search.fill("nothing like it")
    expect(page.get_by_text("No route matches")).to_be_visible()
    search.fill("")
    page.get_by_role("button", name="Show 150 more").click()
    expect(rows).to_have_count(200)
    watched.check()
    page.context.close()


def test_an_empty_stack_says_what_to_run(own: ConsoleStack, browser: Browser) -> None:
    """Nobody is left before a blank page."""
    watched = watch(browser, own)
    page = watched.log_in()
    expect(page.get_by_text("stillhouse up --config")).to_be_visible()
    expect(page.get_by_text("stillhouse rollout start ROUTE MODEL")).to_be_visible()
    page.get_by_role("link", name="History").click()
    expect(page.get_by_text("Nothing was rolled out yet.")).to_be_visible()
    page.goto(f"{own.console}#/rollouts/none")
    expect(page.get_by_role("heading", name="No such rollout")).to_be_visible()
    watched.refusals_expected = True  # the 404
    watched.check()
    page.context.close()


# steering ---------------------------------------------------------------------------------------


def test_a_rollout_is_paused_with_nothing_but_the_keyboard(live: ConsoleStack, watched: Watched) -> None:
    """Tab, Enter, Escape: the focus enters the dialog, stays in it, comes back, and lands on the heading."""
    rollout_id = ramping(live, "keyed")
    page = watched.open()
    page.keyboard.type(live.key)  # the field has the focus
    page.keyboard.press("Enter")
    card = page.get_by_role("article", name="Rollout of keyed")
    card.wait_for()
    tab_to(page, "keyed")
    page.keyboard.press("Enter")
    expect(phase(page)).to_have_text("ramping")
    assert active(page) == "title"
    tab_to(page, "pause")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Pause the rollout of keyed?")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text("Harm is still judged and still rolls back.")
    assert active(page) == "confirm-reason"
    for _ in range(7):
        page.keyboard.press("Tab")
        inside = "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
        assert page.evaluate(inside)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert active(page) == "pause"
    assert commands(live, rollout_id) == []
    page.keyboard.press("Enter")
    page.keyboard.type("to look at it")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(phase(page)).to_have_text("paused", timeout=SLOW_MS)
    expect(page.locator(".hero .reason")).to_have_text(f"paused by {live.key_id}: to look at it")
    expect(page.get_by_role("button", name="pause")).to_have_count(0)
    wait_until("the focus is not lost", lambda: active(page) == "title")
    assert commands(live, rollout_id) == ["pause"]
    live.rollouts.add_command(rollout_id, "abort", "ann")


def test_abort_needs_a_reason_and_reaches_the_store(live: ConsoleStack, watched: Watched) -> None:
    """Said in one sentence, marked as dangerous, refused without a reason; then the route is as before."""
    rollout_id = ramping(live, "ended")
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    page.get_by_role("button", name="abort").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("The canary's weight goes to zero")
    expect(dialog).to_contain_text("It is ramping with 20 % of the traffic on student:1.")
    yes = dialog.get_by_role("button", name="Abort")
    assert yes.get_attribute("class") == "danger"
    yes.click()
    expect(dialog.get_by_role("alert")).to_have_text("Say why: it goes into the audit trail.")
    expect(dialog.get_by_label("Reason (needed)")).to_have_attribute("aria-invalid", "true")
    dialog.get_by_role("button", name="Cancel").click()
    assert commands(live, rollout_id) == []
    page.get_by_role("button", name="abort").click()
    expect(dialog.get_by_role("alert")).to_have_text("")
    dialog.get_by_label("Reason (needed)").fill("wrong model")
    yes.click()
    expect(phase(page)).to_have_text("aborted", timeout=SLOW_MS)
    wait_until("it is over", lambda: live.rollouts.get(rollout_id).status.phase is Phase.ABORTED)
    split = live.traffic.get_split("ended")
    assert split is not None
    assert (split.weight, split.canary, split.stable.name) == (0.0, None, "big-teacher")
    assert live.rollouts.get(rollout_id).status.reason == f"aborted by {live.key_id}: wrong model"
    page.get_by_role("link", name="History").click()
    row = page.get_by_role("row", name=re.compile("ended"))
    expect(row).to_contain_text(f"aborted by {live.key_id}: wrong model", timeout=SLOW_MS)
    expect(row).to_contain_text("20 %")


def test_a_command_that_came_too_late_is_said_in_the_dialog(live: ConsoleStack, watched: Watched) -> None:
    """Somebody else ended it meanwhile: the server's sentence, and the dialog stays."""
    rollout_id = ramping(live, "late")
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    watched.refusals_expected = True
    page.get_by_role("button", name="promote").click()
    live.rollouts.add_command(rollout_id, "abort", "ann")
    wait_until("it is over", lambda: live.rollouts.get(rollout_id).status.phase is Phase.ABORTED)
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Reason (needed)").fill("now")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("promote is not possible: the rollout is aborted")
    assert commands(live, rollout_id) == ["abort"]
    page.keyboard.press("Escape")
    wait_until("the focus is not lost", lambda: active(page) == "title")


def test_a_command_nobody_obeys_yet_is_shown_as_waiting(own: ConsoleStack, browser: Browser) -> None:
    """Without a controller the command waits, its button is off, and a banner says why."""
    rollout_id = ramping(own, "waiting")
    watched = watch(browser, own)
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    button = page.get_by_role("button", name="pause")
    button.wait_for()
    own.paused = True
    page.get_by_role("button", name="pause").click()
    page.get_by_label("Reason").fill("soon")
    page.keyboard.press("Enter")
    expect(page.locator(".pending")).to_contain_text(f"pause was asked for by {own.key_id}")
    expect(button).to_have_attribute("aria-disabled", "true")
    button.click(force=True)
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_role("alert").first).to_contain_text("No controller is acting", timeout=SLOW_MS)
    own.paused = False
    expect(phase(page)).to_have_text("paused", timeout=SLOW_MS)
    expect(page.locator("#banner")).to_be_hidden(timeout=SLOW_MS)
    watched.check()
    page.context.close()


# keys and safety --------------------------------------------------------------------------------


def test_the_key_is_asked_for_once_and_forgotten_on_the_way_out(live: ConsoleStack, watched: Watched) -> None:
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
    KeyState(live.engine).create_key(plain)
    page.get_by_label("Admin key").fill(secret)
    page.keyboard.press("Enter")
    expect(page.locator("#login-error")).to_have_text("This API key is not an admin key.")
    page.get_by_label("Admin key").fill(live.key)
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


def test_a_key_that_is_disabled_ends_the_session(own: ConsoleStack, browser: Browser) -> None:
    """Nothing stays on the screen of somebody who may no longer see it."""
    own.route("secret-route")
    watched = watch(browser, own)
    page = watched.log_in()
    expect(page.get_by_text("secret-route")).to_be_visible()
    watched.refusals_expected = True
    KeyState(own.engine).change_key(own.key_id, disabled=True)
    expect(page.locator("#login-error")).to_contain_text("disabled or expired", timeout=SLOW_MS)
    expect(page.get_by_text("secret-route")).to_have_count(0)
    watched.check()
    page.context.close()


def test_names_are_text_whatever_they_say(live: ConsoleStack, watched: Watched) -> None:
    """Markup in a model's name, a person's name, a reason: shown letter by letter, never run."""
    evil = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>\"'&lt;"
    rollout_id = ramping(live, "hostile", model_ref=f"{evil}:1", created_by=evil)
    live.rollouts.add_command(rollout_id, "pause", evil, evil)
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    expect(page.locator(".hero .reason")).to_have_text(f"paused by {evil}: {evil}", timeout=SLOW_MS)
    expect(page.locator("#title")).to_have_text(f"hostile ← {evil}:1")
    page.get_by_role("button", name="promote").click()
    expect(page.get_by_role("dialog")).to_contain_text(f"{evil}:1.")
    page.keyboard.press("Escape")
    page.get_by_role("link", name="History").click()
    expect(page.get_by_role("row", name=re.compile("hostile"))).to_contain_text(evil)
    live.rollouts.add_command(rollout_id, "abort", evil)
    expect(page.locator("#toasts")).to_contain_text("hostile: aborted", timeout=SLOW_MS)
    assert page.evaluate("window.pwned") is None
    assert page.locator("#view img, #view script, #toasts img").count() == 0


def test_the_browser_enforces_the_policy(live: ConsoleStack, watched: Watched) -> None:
    """Even somebody who got code in could not build HTML, load a script or talk to another server."""
    page = watched.log_in()
    with pytest.raises(Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    away = "fetch('http://127.0.0.2:9/').then(() => 'sent', (e) => e.name)"
    assert page.evaluate(away) == "TypeError"
    styled = "(() => { const d = document.createElement('p'); d.setAttribute('style', 'color: red'); return d.style.color })()"
    page.evaluate(styled)
    blocked = [s for s in watched.said if "Content Security Policy" in s or "TrustedHTML" in s]
    assert any("connect-src" in s for s in blocked)
    watched.said = [s for s in watched.said if s not in blocked]
    watched.asked = [u for u in watched.asked if "127.0.0.2" not in u]


def test_without_keys_nobody_is_asked_for_one(browser: Browser, own: ConsoleStack) -> None:
    """--insecure on loopback: the console opens at once, and says who asked as 'nobody'."""
    rollout_id = ramping(own, "open")
    own.admin.stop()
    own.admin = own.start_admin(0, "--insecure")
    watched = watch(browser, own)
    page = watched.open(f"#/rollouts/{rollout_id}")
    page.get_by_role("button", name="pause").click()
    page.keyboard.press("Enter")
    expect(page.locator(".hero .reason")).to_have_text("paused by nobody", timeout=SLOW_MS)
    expect(page.get_by_role("button", name="Log out")).to_be_hidden()
    watched.check()
    page.context.close()


# when things fail -------------------------------------------------------------------------------


def test_old_data_is_called_old_until_the_server_is_back(own: ConsoleStack, browser: Browser) -> None:
    """Server gone, then store gone: a banner says which, nothing can be asked, and it heals by itself."""
    rollout_id = ramping(own, "steady")
    watched = watch(browser, own)
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    expect(page.locator("#connection-text")).to_have_text("Live")
    watched.refusals_expected = True
    port = int(own.admin.url.rsplit(":", 1)[1])
    own.admin.stop()
    banner = page.locator("#banner")
    expect(banner).to_have_text(
        "The admin server does not answer. What you see is old; trying again.", timeout=SLOW_MS
    )
    assert banner.get_attribute("role") == "alert"
    expect(page.locator("#connection-text")).to_have_text(re.compile(r"^Stale, \d+ s$"))
    expect(page.get_by_role("button", name="pause")).to_have_attribute("aria-disabled", "true")
    expect(phase(page)).to_have_text("ramping")
    own.admin = own.start_admin(port)
    expect(banner).to_be_hidden(timeout=SLOW_MS)
    expect(page.get_by_role("button", name="pause")).not_to_have_attribute("aria-disabled", "true")
    own.paused = True
    with own.engine.begin() as db:
        db.exec_driver_sql("ALTER TABLE splits RENAME TO elsewhere")
    expect(banner).to_contain_text("The state store cannot be reached at the moment.", timeout=SLOW_MS)
    with own.engine.begin() as db:
        db.exec_driver_sql("ALTER TABLE elsewhere RENAME TO splits")
    own.paused = False
    expect(banner).to_be_hidden(timeout=SLOW_MS)
    watched.check()
    page.context.close()


# for everybody ----------------------------------------------------------------------------------


def audit(page: Page, where: str) -> None:
    """Names, roles, headings, references and contrast of what is shown now."""
    found = page.evaluate(f"({AUDIT})()")
    assert found["wrong"] == [], where
    assert found["texts"] > 5, where


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_named_ordered_and_readable(own: ConsoleStack, browser: Browser, scheme: str) -> None:
    """Accessible names, roles, one h1, no skipped level, and 4.5 : 1 for every visible text, in both schemes."""
    own.route("plain")
    kept, harmed = ramping(own, "kept"), ramping(own, "harmed")
    watched = watch(browser, own, color_scheme=scheme, reduced_motion="reduce")
    page = watched.open()
    audit(page, "login")
    page.get_by_label("Admin key").fill("x y")
    page.keyboard.press("Enter")
    audit(page, "login refused")
    page = watched.log_in()
    page.get_by_role("article", name="Rollout of kept").wait_for()
    audit(page, "overview")
    page.goto(f"{own.console}#/rollouts/{kept}")
    page.get_by_role("meter").first.wait_for()
    audit(page, "rollout")
    assert page.evaluate("document.getAnimations().length") == 0
    for verb in ("pause", "abort"):
        page.get_by_role("button", name=verb).click()
        page.keyboard.press("Enter" if verb == "abort" else "End")
        audit(page, f"dialog {verb}")
        page.keyboard.press("Escape")
    own.rollouts.add_command(kept, "pause", "ann")
    own.canary = BROKEN
    wait_until("it is thrown back", lambda: own.rollouts.get(harmed).status.phase is Phase.ROLLED_BACK)
    own.canary = GOOD
    page.goto(f"{own.console}#/rollouts/{harmed}")
    expect(phase(page)).to_have_text("rolled back", timeout=SLOW_MS)
    audit(page, "rolled back")
    page.goto(f"{own.console}#/history")
    page.get_by_role("row").nth(2).wait_for()
    audit(page, "history")
    own.paused = True
    expect(page.locator("#banner")).to_be_visible(timeout=SLOW_MS) if own.rollouts.active() else None
    audit(page, "banner")
    watched.check()
    page.context.close()


def test_a_phone_shows_everything_without_scrolling_sideways(live: ConsoleStack, browser: Browser) -> None:
    """380 pixels: cards instead of columns, and tables that are still tables for a screen reader."""
    rollout_id = ramping(live, "small")
    watched = watch(browser, live, width=380)
    page = watched.log_in()
    for path, heading in (
        ("#/", "Overview"),
        (f"#/rollouts/{rollout_id}", "small ← student:1"),
        ("#/history", "History"),
    ):
        page.goto(live.console + path)
        expect(page.get_by_role("heading", name=heading, level=1)).to_have_count(1)
        page.get_by_role("table").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 380, path
    row = page.get_by_role("row", name=re.compile("small"))
    assert row.get_by_role("rowheader").count() == 1
    assert row.get_by_role("cell").count() == 6
    live.rollouts.add_command(rollout_id, "abort", "ann")
    watched.check()
    page.context.close()


def test_the_trail_can_be_read_to_its_beginning(live: ConsoleStack, watched: Watched) -> None:
    """Moves first; looks when they are wanted; older entries until there are none."""
    live.route("long")
    spec = live.start("long", slow_policy(look_s=0.2, no_data_deadline_s=60.0))
    wait_until("many looks", lambda: len(live.rollouts.audit(spec.id)) > 45, timeout_s=60.0)
    live.rollouts.add_command(spec.id, "abort", "ann")
    wait_until("it is over", lambda: live.rollouts.get(spec.id).status.phase is Phase.ABORTED)
    page = watched.log_in(f"#/rollouts/{spec.id}")
    entries = page.locator(".timeline li")
    trail = live.rollouts.audit(spec.id)
    expect(entries).to_have_count(len([e for e in trail if e.kind == "transition"]))
    page.get_by_label("also looks that moved nothing").check()
    expect(entries).to_have_count(30)
    older = page.get_by_role("button", name="Older entries")
    while older.count():
        before = entries.count()
        older.click()
        expect(entries).not_to_have_count(before)
    assert entries.count() == len(trail)
    expect(entries.last).to_contain_text("pending → warming")
