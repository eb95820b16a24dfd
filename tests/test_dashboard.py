"""The dashboard, used in a real browser: from a file and from its own server."""

import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import needs_chromium, watched_page
from latents import add_scores, make_results, scored
from playwright.sync_api import expect

from fastcache.cache_format.schema import TOKEN_SETS
from fastcache.progress import Silent
from fastcache.stages.interpret.dashboard.build import build

MANY = 65_536


@pytest.fixture
def page(browser, dashboard):
    with watched_page(browser) as page:
        page.goto(dashboard.as_uri())
        page.wait_for_selector("#rows .row")
        yield page


def listed(page):
    """Numbers of the latents at the top of the list."""
    return [int(text[1:]) for text in page.locator("#rows .row > :first-child").all_inner_texts()]


def opened(page):
    return page.locator("#latent h2").inner_text()


def wait_for(page, heading):
    # Not by a function in the page: its policy lets nothing be evaluated there.
    expect(page.locator("#latent h2")).to_have_text(heading)


def densities(results, name="density_all"):
    return pq.read_table(results / "latents.parquet")[name].to_pylist()


@needs_chromium
def test_the_best_scored_latents_come_first(page):
    assert listed(page)[:3] == [7, 150, 11]
    assert page.inner_text("#count") == "200 latents"
    assert "200 latents of sae-fast; 500 dialogues, 10,000 tokens, split interpret." in page.inner_text("#about")


@needs_chromium
@pytest.mark.parametrize("column", ["density_all", "density_special", "density_assistant"])
def test_sorting_by_density_is_that_of_the_table(page, scored_latents, column):
    values = densities(scored_latents, column)
    expected = sorted(range(200), key=lambda latent: (-values[latent], latent))
    page.select_option("#sort", column)
    assert listed(page)[:15] == expected[:15]
    page.click("#direction")
    expected = sorted(range(200), key=lambda latent: (values[latent], latent))
    assert listed(page)[:15] == expected[:15]


@needs_chromium
def test_latents_without_a_score_are_last_in_either_direction(page):
    page.select_option("#sort", "score")
    page.click("#direction")
    assert listed(page)[:4] == [11, 150, 7, 0]
    page.check("#scored")
    assert listed(page) == [11, 150, 7]


@needs_chromium
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("word123", [123]),
        ("SEAS", [7]),
        ("zürich &", [150]),
        ("77", [77, 177]),
        ("#5", [5]),
        (" word15", [15, *range(150, 160)]),
    ],
)
def test_search_finds_names_tokens_and_numbers(page, query, expected):
    page.fill("#search", query)
    assert sorted(listed(page)) == expected
    assert page.inner_text("#count") == f"{len(expected)} of 200 latents"


@needs_chromium
def test_a_search_without_results_says_so(page):
    page.fill("#search", "nowhere to be found")
    assert page.inner_text("#count") == "0 of 200 latents"
    page.keyboard.press("Enter")
    assert page.inner_text("#latent") == "Choose a latent."


@needs_chromium
def test_an_opened_latent_shows_what_the_tables_hold(page, scored_latents):
    page.fill("#search", "#7")
    page.click("#rows .row")
    page.wait_for_selector("#latent h2")
    assert opened(page) == "#7 names of seas"
    contexts = page.locator(".context")
    assert contexts.count() == 15
    first = contexts.first
    assert first.locator(".tokens").inner_text() == "<|im_start|> the word7 of dialogue0"
    assert "9.5 dialogue 100 (corpus row 1100), token 5, user" in first.inner_text().replace("\xa0", " ").replace(
        "  ", " "
    )
    assert first.locator(".peak").inner_text() == " word7"
    assert first.locator(".special").all_inner_texts() == ["<|im_start|>"]
    heat = [
        float(token.evaluate("e => e.style.getPropertyValue('--heat') || 0")) for token in first.locator(".token").all()
    ]
    assert heat[2] > heat[1] > heat[0] == heat[3] == 0
    assert page.locator("#densities tr").count() == len(TOKEN_SETS)
    assert page.locator("#histogram rect").count() == 3
    page.click("summary")
    assert page.inner_text("blockquote") == "Clear. [[5]] [[names of seas]]"


@needs_chromium
def test_a_neighbour_is_a_link(page):
    page.goto(page.url + "#7")
    page.get_by_role("button", name="#9 ").click()
    wait_for(page, "#9")
    assert page.url.endswith("#9")
    assert page.locator("[aria-selected=true]").inner_text().startswith("#9")


@needs_chromium
def test_a_dead_latent_and_an_unread_answer_are_told(page):
    page.fill("#search", "#77")
    assert "never active" in page.inner_text("#rows")
    page.keyboard.press("Enter")
    wait_for(page, "#77")
    assert page.locator(".context").count() == 0
    page.fill("#search", "#12")
    page.keyboard.press("Enter")
    wait_for(page, "#12")
    assert "no score: empty" in page.inner_text("#latent")


@needs_chromium
def test_everything_can_be_done_by_keyboard(page):
    page.keyboard.press("/")
    page.keyboard.type("word19")
    listed_now = listed(page)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#latent h2")
    assert opened(page) == f"#{listed_now[1]}"
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    wait_for(page, f"#{listed_now[2]}")
    page.keyboard.press("k")
    page.keyboard.press("k")
    wait_for(page, f"#{listed_now[0]}")
    page.keyboard.press("End")
    assert page.locator("[aria-selected=true]").inner_text().startswith(f"#{listed_now[-1]}")
    assert page.get_attribute("#list", "aria-activedescendant") == f"row-{listed_now[-1]}"


@needs_chromium
def test_an_address_opens_its_latent(browser, dashboard):
    with watched_page(browser) as page:
        page.goto(dashboard.as_uri() + "#42")
        page.wait_for_selector("#latent h2")
        assert opened(page) == "#42"
        for nowhere in ("#200", "#-1", "#x", "#1e99"):
            page.goto(dashboard.as_uri() + nowhere)
        assert opened(page) == "#42"


@needs_chromium
def test_a_missing_data_file_is_named(browser, dashboard, tmp_path):
    shutil.copytree(dashboard.parent, tmp_path / "copy")
    (tmp_path / "copy" / "data" / "latents-00001.js").unlink()
    page = browser.new_page()
    page.goto((tmp_path / "copy" / "index.html").as_uri() + "#100")
    page.wait_for_selector("text=data/latents-00001.js can't be loaded")
    page.close()


@needs_chromium
@pytest.mark.parametrize("content", ["", "fastcacheLatents(1,["])
def test_a_torn_data_file_is_named(browser, dashboard, tmp_path, content):
    shutil.copytree(dashboard.parent, tmp_path / "copy")
    (tmp_path / "copy" / "data" / "latents-00001.js").write_text(content)
    page = browser.new_page()
    page.goto((tmp_path / "copy" / "index.html").as_uri() + "#100")
    page.wait_for_selector("text=data/latents-00001.js can't be loaded")
    page.close()


@needs_chromium
def test_a_file_that_fails_late_does_not_take_the_place_of_another_latent(browser, served):
    page = browser.new_page()
    held = []

    def hold(route):
        held.append(route)

    page.route("**/latents-00001.js", hold)
    page.goto(f"http://localhost:{served.server_port}/#100", wait_until="commit")
    page.wait_for_selector("#rows .row")
    page.fill("#search", "#7")
    page.keyboard.press("Enter")
    wait_for(page, "#7 names of seas")
    held[0].abort()
    page.wait_for_timeout(100)
    assert opened(page) == "#7 names of seas"
    page.close()


@needs_chromium
def test_the_server_shows_the_same_page(browser, served):
    with watched_page(browser) as page:
        page.goto(f"http://localhost:{served.server_port}/#7")
        page.wait_for_selector("#latent h2")
        assert opened(page) == "#7 names of seas"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """65,536 latents, of which 130 are active."""
    folder = tmp_path_factory.mktemp("large") / "latents"
    live = {*range(65), *range(MANY - 65, MANY)}
    results = make_results(folder, MANY, dead=frozenset(range(MANY)) - live)
    return build(results, None, folder / "dashboard", Silent())


@needs_chromium
def test_65536_latents_are_listed_by_a_few_rows_and_loaded_when_opened(browser, large):
    loaded = []
    with watched_page(browser) as page:
        page.on("request", lambda request: loaded.append(request.url.rpartition("/")[2]))
        page.goto(large.as_uri())
        page.wait_for_selector("#rows .row")
        assert page.inner_text("#count") == "65,536 latents"
        assert loaded == ["index.html", "index.js"]
        assert page.locator(".row").count() < 60
        page.select_option("#sort", "number")
        page.click("#direction")
        page.keyboard.press("Escape")
        page.keyboard.press("End")
        assert f"#{0}" in page.inner_text("#rows")
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        page.wait_for_selector("#latent h2")
        assert opened(page) == f"#{MANY - 1}"
        assert loaded == ["index.html", "index.js", "latents-01023.js"]
        assert page.locator(".context").count() == 9


def hostile(text):
    return f"</script></title><img src=x onerror='window.hacked=1'><script>window.hacked=1;alert(1)</script>{text}"


@needs_chromium
def test_markup_in_texts_names_and_answers_is_never_run(browser, tmp_path):
    results = make_results(tmp_path / "latents", 70, word=hostile("\u2028w"), trained_on=hostile("m"))
    table = pq.read_table(results / "latents.parquet")
    tokens = pa.array([[{"token": hostile("up"), "value": 1.0}]] * 70)
    table = table.set_column(table.column_names.index("promoted"), "promoted", tokens)
    pq.write_table(table, results / "latents.parquet")
    add_scores(results, [{**scored(n, 3, hostile("name")), "answer": hostile("answer")} for n in range(70)])
    made = build(results, None, tmp_path / "dashboard", Silent())
    with watched_page(browser) as page:
        page.goto(made.as_uri() + "#66")
        page.wait_for_selector("#latent h2")
        page.keyboard.press("Escape")
        page.keyboard.press("j")
        wait_for(page, re.compile("^#67 "))
        page.click("summary")
        assert page.evaluate("window.hacked") is None
        assert page.locator("img, #latent script, #rows script").count() == 0
        shown = page.inner_text("body")
        for text in ("name", "up", "answer", "m"):
            assert hostile(text) in shown
        assert "<img src=x" in page.title()


@needs_chromium
def test_the_policy_of_the_page_forbids_inline_script_and_network(browser, dashboard):
    page = browser.new_page()
    blocked = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto(dashboard.as_uri())
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked=1'}))"
    )
    # Messages come in order: when that of the last of the three is here, so are the others.
    with page.expect_console_message(lambda message: re.search("connect-src|default-src", message.text)):
        page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert page.evaluate("window.hacked") is None
    assert any("connect-src" in text or "default-src" in text for text in blocked)
    page.close()
