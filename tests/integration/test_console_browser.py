"""The console in a real browser: what is seen without a reload, and steered by mouse and keyboard."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, expect

from contracts.rollout import Phase
from contracts.traffic import Upstream
from tests.integration.console_rig import (
    ConsoleStack,
    Watched,
    active,
    commands,
    phase,
    ramping,
    slow_policy,
    tab_to,
    watch,
)
from tests.integration.router_rig import wait_until
from tests.unit.rollout_world import BROKEN

pytestmark = [pytest.mark.integration, pytest.mark.browser]
SLOW_MS = 30_000


# seeing -----------------------------------------------------------------------------------------


def test_what_happens_is_seen_without_a_reload(console: ConsoleStack, watched: Watched) -> None:
    """Routes, a new rollout, its phases and its end come by themselves, and are announced politely."""
    console.route("seen")
    page = watched.log_in()
    row = page.get_by_role("row", name=re.compile("seen"))
    expect(row).to_contain_text("2 of 2 on split 1", timeout=SLOW_MS)
    spec = console.start("seen")
    card = page.get_by_role("article", name="Rollout of seen")
    expect(card).to_contain_text("ramping", timeout=SLOW_MS)
    expect(card.locator('[aria-current="step"]')).to_have_text(re.compile("20 %"), timeout=SLOW_MS)
    expect(row.get_by_role("img")).to_have_attribute(
        "aria-label", "20 % to canary student-v1, 80 % to stable big-teacher"
    )
    console.rollouts.add_command(spec.id, "pause", "ann", "by the terminal")
    expect(card.locator(".chip")).to_have_text("paused", timeout=SLOW_MS)
    expect(page.locator("#toasts")).to_contain_text("seen: ramping → paused")
    assert page.locator("#toasts").get_attribute("aria-live") == "polite"
    console.rollouts.add_command(spec.id, "abort", "ann")
    expect(card).to_have_count(0, timeout=SLOW_MS)
    expect(page.locator("#toasts")).to_contain_text("seen: aborted", timeout=SLOW_MS)
    assert [u for u in watched.asked if u.endswith("/console")] == [console.console]


def test_evidence_is_drawn_as_the_controller_stored_it(console: ConsoleStack, watched: Watched) -> None:
    """Each metric's two tests against what decides, counts by arm, and a curve over the looks."""
    rollout_id = ramping(console, "drawn")
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
    assert 0 < shown <= console.rollouts.get(rollout_id).status.total_counts["canary"].n
    console.rollouts.add_command(rollout_id, "abort", "ann")


def test_a_harmful_student_is_seen_to_be_thrown_back(own_console: ConsoleStack, browser: Browser) -> None:
    """The sentence, the verdict at its metric and the trail say why, without anybody having reloaded."""
    rollout_id = ramping(own_console, "harmed")
    watched = watch(browser, own_console)
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    expect(phase(page)).to_have_text("ramping")
    own_console.canary = BROKEN
    expect(phase(page)).to_have_text("rolled back", timeout=SLOW_MS)
    expect(page.locator(".hero .reason")).to_contain_text("quality: canary got")
    expect(page.get_by_role("region", name="Evidence on quality").locator(".chip")).to_have_text("harm")
    expect(page.locator(".timeline li").first).to_contain_text("rolling back → rolled back")
    expect(page.get_by_role("group", name="Commands")).to_have_count(0)
    watched.check()
    page.context.close()


def test_two_hundred_routes_are_searched_not_scrolled(own_console: ConsoleStack, browser: Browser) -> None:
    """Fifty are shown; typing finds any by name or upstream, and what was typed survives updates."""
    for i in range(200):
        own_console.route(
            f"route-{i:03}", Upstream(name=f"teacher-{i % 7}", model="m", url="http://127.0.0.1:9")
        )
    watched = watch(browser, own_console)
    page = watched.log_in()
    rows = page.locator("#view tbody tr")
    expect(rows).to_have_count(50, timeout=SLOW_MS)
    search = page.get_by_label("Search routes")
    search.press_sequentially("route-19")
    expect(rows).to_have_count(10)
    expect(page.get_by_text("10 of 200")).to_be_visible()
    own_console.traffic.put_split(own_console.traffic.splits()["route-190"].model_copy(update={"version": 2}))
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


def test_an_empty_stack_says_what_to_run(own_console: ConsoleStack, browser: Browser) -> None:
    """Nobody is left before a blank page."""
    watched = watch(browser, own_console)
    page = watched.log_in()
    expect(page.get_by_text("stillhouse up --config")).to_be_visible()
    expect(page.get_by_text("stillhouse rollout start ROUTE MODEL")).to_be_visible()
    page.get_by_role("link", name="History").click()
    expect(page.get_by_text("Nothing was rolled out yet.")).to_be_visible()
    page.goto(f"{own_console.console}#/rollouts/none")
    expect(page.get_by_role("heading", name="No such rollout")).to_be_visible()
    watched.refusals_expected = True  # the 404
    watched.check()
    page.context.close()


def test_the_trail_can_be_read_to_its_beginning(console: ConsoleStack, watched: Watched) -> None:
    """Moves first; looks when they are wanted; older entries until there are none."""
    console.route("long")
    spec = console.start("long", slow_policy(look_s=0.2, no_data_deadline_s=60.0))
    wait_until("many looks", lambda: len(console.rollouts.audit(spec.id)) > 45, timeout_s=60.0)
    console.rollouts.add_command(spec.id, "abort", "ann")
    wait_until("it is over", lambda: console.rollouts.get(spec.id).status.phase is Phase.ABORTED)
    page = watched.log_in(f"#/rollouts/{spec.id}")
    entries = page.locator(".timeline li")
    trail = console.rollouts.audit(spec.id)
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


# steering ---------------------------------------------------------------------------------------


def test_a_rollout_is_paused_with_nothing_but_the_keyboard(console: ConsoleStack, watched: Watched) -> None:
    """Tab, Enter, Escape: the focus enters the dialog, stays in it, comes back, and lands on the heading."""
    rollout_id = ramping(console, "keyed")
    page = watched.open()
    page.keyboard.type(console.key)  # the field has the focus
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
    assert commands(console, rollout_id) == []
    page.keyboard.press("Enter")
    page.keyboard.type("to look at it")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(phase(page)).to_have_text("paused", timeout=SLOW_MS)
    expect(page.locator(".hero .reason")).to_have_text(f"paused by {console.key_id}: to look at it")
    expect(page.get_by_role("button", name="pause")).to_have_count(0)
    wait_until("the focus is not lost", lambda: active(page) == "title")
    assert commands(console, rollout_id) == ["pause"]
    console.rollouts.add_command(rollout_id, "abort", "ann")


def test_abort_needs_a_reason_and_reaches_the_store(console: ConsoleStack, watched: Watched) -> None:
    """Said in one sentence, marked as dangerous, refused without a reason; then the route is as before."""
    rollout_id = ramping(console, "ended")
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
    assert commands(console, rollout_id) == []
    page.get_by_role("button", name="abort").click()
    expect(dialog.get_by_role("alert")).to_have_text("")
    dialog.get_by_label("Reason (needed)").fill("wrong model")
    yes.click()
    expect(phase(page)).to_have_text("aborted", timeout=SLOW_MS)
    wait_until("it is over", lambda: console.rollouts.get(rollout_id).status.phase is Phase.ABORTED)
    split = console.traffic.get_split("ended")
    assert split is not None
    assert (split.weight, split.canary, split.stable.name) == (0.0, None, "big-teacher")
    assert console.rollouts.get(rollout_id).status.reason == f"aborted by {console.key_id}: wrong model"
    page.get_by_role("link", name="History").click()
    row = page.get_by_role("row", name=re.compile("ended"))
    expect(row).to_contain_text(f"aborted by {console.key_id}: wrong model", timeout=SLOW_MS)
    expect(row).to_contain_text("20 %")


def test_a_command_that_came_too_late_is_said_in_the_dialog(console: ConsoleStack, watched: Watched) -> None:
    """Somebody else ended it meanwhile: the server's sentence, and the dialog stays."""
    rollout_id = ramping(console, "late")
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    watched.refusals_expected = True
    page.get_by_role("button", name="promote").click()
    console.rollouts.add_command(rollout_id, "abort", "ann")
    wait_until("it is over", lambda: console.rollouts.get(rollout_id).status.phase is Phase.ABORTED)
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Reason (needed)").fill("now")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("promote is not possible: the rollout is aborted")
    assert commands(console, rollout_id) == ["abort"]
    page.keyboard.press("Escape")
    wait_until("the focus is not lost", lambda: active(page) == "title")


def test_a_command_nobody_obeys_yet_is_shown_as_waiting(own_console: ConsoleStack, browser: Browser) -> None:
    """Without a controller the command waits, its button is off, and a banner says why."""
    rollout_id = ramping(own_console, "waiting")
    watched = watch(browser, own_console)
    page = watched.log_in(f"#/rollouts/{rollout_id}")
    button = page.get_by_role("button", name="pause")
    button.wait_for()
    with own_console.paused():
        page.get_by_role("button", name="pause").click()
        page.get_by_label("Reason").fill("soon")
        page.keyboard.press("Enter")
        expect(page.locator(".pending")).to_contain_text(f"pause was asked for by {own_console.key_id}")
        expect(button).to_have_attribute("aria-disabled", "true")
        button.click(force=True)
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(page.get_by_role("alert").first).to_contain_text("No controller is acting", timeout=SLOW_MS)
    expect(phase(page)).to_have_text("paused", timeout=SLOW_MS)
    expect(page.locator("#banner")).to_be_hidden(timeout=SLOW_MS)
    watched.check()
    page.context.close()
