"""The report page in a headless Chromium: what is drawn is what the page's numbers say, by mouse and by keyboard."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import STORIES_MODEL, STORIES_TEXT, tiny_tokenizer
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from ecmoe.analysis import report
from ecmoe.conversion import convert
from ecmoe.finetune import run
from ecmoe.finetune.recipe import make_recipe

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not on the PATH (Debian: chromium-driver)"
)

TUNING = {
    "dataset": str(STORIES_TEXT),
    "max_length": 256,
    "packing": True,
    "per_device_train_batch_size": 8,
    "max_eval_sequences": 4,
    "max_steps": 5,
    "learning_rate": 3e-4,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


class Browser:
    """A page in Chromium, and the numbers that lie in it."""

    def __init__(self, driver: webdriver.Chrome, page: Path) -> None:
        self.driver = driver
        driver.get(page.as_uri())
        self.numbers = json.loads(self.script("return document.getElementById('routes').textContent"))

    def script(self, source: str, *arguments: object) -> Any:
        return self.driver.execute_script(source, *arguments)

    def select(self, layer: str, expert: str) -> None:
        for name, text in (("layer", layer), ("expert", expert)):
            Select(self.driver.find_element(By.ID, name)).select_by_visible_text(text)

    def values(self) -> list[float]:
        found = self.script("return [...document.querySelectorAll('#text span')].map((e) => e.dataset.value)")
        return [float(value) for value in found]

    def shades(self) -> list[str]:
        """The backgrounds that tokens really have."""
        return self.script(
            "return [...document.querySelectorAll('#text span')].map((e) => getComputedStyle(e).backgroundColor)"
        )

    def uncovered(self) -> list[bool]:
        return self.script(
            "return [...document.querySelectorAll('#text span')].map("
            "(e) => getComputedStyle(e).textDecorationLine === 'underline')"
        )

    def text(self, element_id: str) -> str:
        return self.driver.find_element(By.ID, element_id).text

    def gate(self, layer: int, token: int, expert: int) -> float:
        chosen, gates = (self.numbers["layers"][layer][name][token] for name in ("chosen", "gates"))
        return gates[chosen.index(expert)] if expert in chosen else 0.0

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    switches = "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking no-first-run"
    for switch in switches.split():
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.add_argument("--window-size=1200,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With both paths given selenium looks for no driver, and downloads none.
    driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=["small", "stories260K"])
def page(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_routed_model: Callable[..., Any]
) -> Path:
    folder = tmp_path_factory.mktemp("page")
    text = "The class of an object is its type.\nA naïve 🙂 set of </script><b>objects</b>.\n"
    if request.param == "small":
        make_routed_model("Llama", vocab_size=310).save_pretrained(folder / "model")
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["</script><b>"])
        tokenizer.save_pretrained(folder / "model")
    else:
        if not (STORIES_MODEL.is_dir() and STORIES_TEXT.is_file()):
            pytest.skip("stories260K and its text are not beside the repository (ECMOE_TEST_DATA)")
        convert(str(STORIES_MODEL), str(folder / "blend"), init="blend", text=str(STORIES_TEXT), verify=False)
        run(make_recipe(TUNING | {"model": str(folder / "blend"), "output_dir": str(folder / "model")}))
        stories = STORIES_TEXT.read_text(encoding="utf-8").split("<|endoftext|>")
        text = "\n\n".join(story.strip() for story in stories[1500:1503:2])
    report(str(folder / "model"), str(folder / "page.html"), text=text)
    return folder / "page.html"


@pytest.fixture
def browser(driver: webdriver.Chrome, page: Path) -> Iterator[Browser]:
    """A fresh load; whatever a test does, the console stays clean."""
    browser = Browser(driver, page)
    yield browser
    assert browser.complaints() == []


def test_the_text_and_nothing_from_elsewhere(browser: Browser) -> None:
    assert browser.script("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    assert browser.script("return document.querySelectorAll('b:not(.favourite b)').length") == 0
    pieces = zip(browser.numbers["texts"], browser.numbers["names"], strict=True)
    shown = browser.script("return [...document.querySelectorAll('#text span')].map((e) => e.textContent)")
    assert shown == [text or name for text, name in pieces]
    assert f"{browser.numbers['loss']:.4g}" in browser.text("facts")


def test_a_script_that_fails_is_seen(driver: webdriver.Chrome, page: Path, tmp_path: Path) -> None:
    """Negative control of the clean console: a page with half of its numbers, and a load from elsewhere."""
    source = page.read_text(encoding="utf-8").replace('"layers":[', '"Layers":[')
    (tmp_path / "broken.html").write_text(source.replace("</main>", '<img src="other.png"></main>'), encoding="utf-8")
    complaints = Browser(driver, tmp_path / "broken.html").complaints()
    assert any("TypeError" in line for line in complaints)
    assert any("Content Security Policy" in line for line in complaints)


def test_layer_and_expert_change_the_shading(browser: Browser) -> None:
    """Each view's values are those of the numbers; views differ; equal values have equal shades."""
    layers, tokens = browser.numbers["layers"], range(len(browser.numbers["ids"]))
    seen = {}
    for layer, expert in (
        ("Layer 0", None),
        ("Layer 1", None),
        ("Layer 1", 2),
        ("Layer 1", 3),
        (None, 2),
        (None, None),
    ):
        browser.select(layer or "All layers", "All experts" if expert is None else f"Expert {expert}")
        shown = range(len(layers)) if layer is None else [int(layer[-1])]
        if expert is None:
            expected = [sum(len(layers[i]["chosen"][t]) for i in shown) / len(shown) for t in tokens]
        else:
            expected = [sum(browser.gate(i, t, expert) for i in shown) / len(shown) for t in tokens]
        assert browser.values() == pytest.approx(expected)
        assert browser.uncovered() == [not any(layers[i]["chosen"][t] for i in shown) for t in tokens]
        shades = seen[layer, expert] = browser.shades()
        by_value = {}
        for value, shade in zip(browser.values(), shades, strict=True):
            assert by_value.setdefault(value, shade) == shade
        assert by_value[max(by_value)] != by_value[min(by_value)]
    assert len({tuple(shades) for shades in seen.values()}) == len(seen)


def numbers_of(browser: Browser, selector: str, name: str) -> list[float | None]:
    found = browser.script(
        f"return [...document.querySelectorAll('{selector}')].map((e) => e.dataset.{name} ?? null)",
    )
    return [None if value is None else float(value) for value in found]


def test_the_drawings_hold_the_numbers(browser: Browser) -> None:
    """Heat map, histograms, load and coverage, for one layer and for all."""
    layers = browser.numbers["layers"]
    browser.select("Layer 1", "All experts")
    layer = layers[1]
    assert numbers_of(browser, "#map td", "value") == [score for row in layer["scores"] for score in row]
    taken = browser.script("return [...document.querySelectorAll('#map td')].map((e) => e.className === 'taken')")
    num_experts = browser.numbers["num_experts"]
    assert taken == [expert in chosen for chosen in layer["chosen"] for expert in range(num_experts)]
    assert numbers_of(browser, "#histograms svg", "threshold") == layer["threshold"]
    counts = browser.script("return [...document.querySelectorAll('#histograms svg')].map((e) => e.dataset.counts)")
    assert [list(map(int, row.split())) for row in counts] == layer["histogram"]["counts"]
    low, high = layer["histogram"]["low"], layer["histogram"]["high"]
    lines = browser.script("return [...document.querySelectorAll('.threshold')].map((e) => e.x1.baseVal.value)")
    assert lines == pytest.approx([240 * (limit - low) / (high - low) for limit in layer["threshold"]], abs=1e-3)
    loads = [load for layer in layers for load in layer["load"]]
    assert numbers_of(browser, "#charts circle", "load") == loads
    assert numbers_of(browser, "#loads td[data-load]", "load") == loads
    assert numbers_of(browser, "#charts rect", "covered") == pytest.approx([1 - layer["uncovered"] for layer in layers])
    rows = browser.script("return [...document.querySelectorAll('#favourites tbody tr')].map((e) => e.textContent)")
    for row, favourites in zip(rows, layer["favourites"], strict=True):
        assert re.findall(r"(\d+) of (\d+)", row) == [(str(f["taken"]), str(f["times"])) for f in favourites]
    browser.select("All layers", "All experts")
    expected = [len(layer["chosen"][t]) for t in range(len(browser.numbers["ids"])) for layer in layers]
    assert numbers_of(browser, "#map td", "value") == expected
    browser.select("All layers", "Expert 2")
    limits = [layer["threshold"][2] for layer in layers]
    assert numbers_of(browser, "#histograms svg", "threshold") == limits
    scores = [layer["scores"][t][2] for t in range(len(browser.numbers["ids"])) for layer in layers]
    assert numbers_of(browser, "#map td", "value") == scores


def check_details(browser: Browser, token: int, layer: int) -> None:
    """The panel's sentence, which is live, and its table name the token's gates."""
    live = browser.driver.find_element(By.CSS_SELECTOR, "[aria-live=polite]")
    assert live.get_attribute("id") == "token"
    numbers = browser.numbers["layers"][layer]
    assert f"Token {token + 1} of {len(browser.numbers['ids'])}," in live.text
    found = re.findall(r"expert (\d+) with gate (\d+(?:\.\d+)?(?:e-\d+)?)", live.text)
    assert [int(expert) for expert, _ in found] == numbers["chosen"][token]
    assert [float(gate) for _, gate in found] == pytest.approx(numbers["gates"][token], rel=6e-3)
    experts = range(browser.numbers["num_experts"])
    every = [browser.gate(i, token, e) or None for i in range(len(browser.numbers["layers"])) for e in experts]
    assert numbers_of(browser, "#gates td", "gate") == every


def test_hover_shows_the_gates(browser: Browser) -> None:
    browser.select("Layer 1", "All experts")
    tokens = browser.driver.find_elements(By.CSS_SELECTOR, "#text span")
    for token in (5, 12):
        ActionChains(browser.driver).move_to_element(tokens[token]).perform()
        check_details(browser, token, layer=1)


def test_the_keyboard_alone(browser: Browser) -> None:
    """Tab reaches the controls and one token; arrows, Home and End move among the tokens and say their gates."""

    def press(*keys: str) -> None:
        ActionChains(browser.driver).send_keys(*keys).perform()

    def focused() -> str | None:
        return browser.script("return document.activeElement.dataset.token ?? document.activeElement.id")

    press(Keys.TAB, Keys.TAB)
    assert focused() == "layer"
    press("Layer 1")
    press(Keys.TAB)
    assert focused() == "expert"
    press(Keys.TAB, Keys.TAB)  # a layer of the picture, and the picture, which scrolls
    assert browser.script("return document.activeElement.querySelector('canvas') !== null")
    press(Keys.TAB)
    assert focused() == "0"
    last = len(browser.numbers["ids"]) - 1
    moves = {Keys.ARROW_RIGHT: 1, Keys.END: last, Keys.ARROW_LEFT: last - 1, Keys.HOME: 0}
    for key, token in moves.items():
        press(key)
        assert focused() == str(token)
        check_details(browser, token, layer=1)
    assert browser.script("return document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1
    outline = browser.script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    top = "return document.activeElement.getClientRects()[0].top"
    first_line = browser.script(top)
    press(Keys.ARROW_DOWN)
    assert browser.script(top) > first_line
    press(Keys.ARROW_UP)
    assert browser.script(top) == pytest.approx(first_line, abs=1)
    press(Keys.TAB)
    assert focused() not in map(str, range(last + 1))


def test_for_screen_readers(browser: Browser) -> None:
    """Everything that takes focus or shows numbers has a name."""
    nameless = browser.script(
        "return [...document.querySelectorAll('svg, [role], select, table, section, [tabindex]')].filter((e) => !("
        "e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.length"
        " || e.caption?.textContent)).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    assert browser.script("return document.documentElement.lang") == "en"
    assert browser.script("return [...document.querySelectorAll('th')].every((e) => e.scope)")
    browser.select("Layer 0", "All experts")
    label = browser.driver.find_element(By.CSS_SELECTOR, "#text span").get_attribute("aria-label")
    assert re.search(rf": {len(browser.numbers['layers'][0]['chosen'][0])} experts?$", label or "")


def leaders(layer: dict[str, Any]) -> list[int | None]:
    """Of each token the expert with the largest gate."""
    return [
        max(zip(gates, experts, strict=True), key=lambda pair: pair[0])[1] if experts else None
        for experts, gates in zip(layer["chosen"], layer["gates"], strict=True)
    ]


def pixels(browser: Browser) -> list[list[tuple[int, ...]]]:
    """The picture's colours, [layers][tokens]."""
    size, data = browser.script(
        "const c = document.getElementById('picture');"
        "return [[c.width, c.height], [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
    )
    colours = [tuple(data[i : i + 4]) for i in range(0, len(data), 4)]
    return [colours[row * size[0] : (row + 1) * size[0]] for row in range(size[1])]


def chips(browser: Browser, inside: str) -> list[tuple[int, ...]]:
    """The colours of a legend's experts, as pixels have them."""
    colours = browser.script(
        "return [...document.querySelectorAll(`${arguments[0]} .chip`)].map((e) => {"
        "const pen = document.createElement('canvas').getContext('2d');"
        "pen.fillStyle = getComputedStyle(e).backgroundColor; pen.fillRect(0, 0, 1, 1);"
        "return [...pen.getImageData(0, 0, 1, 1).data]})",
        inside,
    )
    return [tuple(colour) for colour in colours]


def test_the_picture_of_all_layers(browser: Browser) -> None:
    """One colour for each expert, none where nobody took the token; the legend has the same ones, in the dark too."""
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        shown, expected = pixels(browser), [leaders(layer) for layer in browser.numbers["layers"]]
        pairs = {
            (expert, colour)
            for row, colours in zip(expected, shown, strict=True)
            for expert, colour in zip(row, colours, strict=True)
        }
        assert len(pairs) == len({expert for expert, _ in pairs}) == len({colour for _, colour in pairs}) > 2
        assert all((colour[3] == 0) == (expert is None) for expert, colour in pairs)
        legend = chips(browser, "#overview-legend")
        assert len(legend) == browser.numbers["num_experts"]
        assert all(colour == legend[expert] for expert, colour in pairs if expert is not None)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_from_the_picture_to_a_layer_and_a_token(browser: Browser) -> None:
    """By a click, which lands where it points; and by the keyboard."""
    layers, tokens = len(browser.numbers["layers"]), len(browser.numbers["ids"])
    canvas = browser.driver.find_element(By.ID, "picture")
    size = browser.script("const b = arguments[0].getBoundingClientRect(); return [b.width, b.height]", canvas)
    for layer, token in ((1, 7), (0, 3)):
        # Selenium counts from the middle of what is to be seen.
        x, y = size[0] * (token + 0.5) / tokens - size[0] / 2, size[1] * (layer + 0.5) / layers - size[1] / 2
        browser.script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        ActionChains(browser.driver).move_to_element_with_offset(canvas, round(x), round(y)).click().perform()
        check_details(browser, int(browser.script("return document.activeElement.dataset.token")), layer)
        assert abs(int(browser.script("return document.activeElement.dataset.token")) - token) <= tokens / size[0] + 1
        pressed = (
            "return [...document.querySelectorAll('#layer-buttons [aria-pressed=true]')].map((e) => e.dataset.row)"
        )
        assert browser.script(pressed) == [str(layer)]
    browser.driver.find_element(By.CSS_SELECTOR, "#layer-buttons [tabindex='0']").send_keys(Keys.ARROW_DOWN)
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.script("return document.getElementById('layer').value") == "1"
    browser.select("All layers", "All experts")
    assert browser.script(pressed) == []


def test_tokens_with_one_number_of_experts_are_told_apart(
    driver: webdriver.Chrome, tmp_path: Path, make_model: Callable[..., Any]
) -> None:
    """Where every token has as many experts as the next, the text has the colours of the leading experts."""
    fields = {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2}
    make_model("Llama", vocab_size=300, **fields).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    report(str(tmp_path / "model"), str(tmp_path / "page.html"), text="The class of an object is its type.")
    browser = Browser(driver, tmp_path / "page.html")
    for number, layer in enumerate(browser.numbers["layers"]):
        browser.select(f"Layer {number}", "All experts")
        by_expert = set(zip(leaders(layer), browser.shades(), strict=True))
        assert len(by_expert) == len({e for e, _ in by_expert}) == len({shade for _, shade in by_expert}) > 1
        assert "Every token has 2 experts here" in browser.text("legend")
        label = browser.driver.find_element(By.CSS_SELECTOR, "#text span").get_attribute("aria-label")
        assert label == f"{browser.numbers['texts'][0]}: leading expert {leaders(layer)[0]}"
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        ink = luminance(browser.script("return getComputedStyle(document.body).color"))
        for colour in chips(browser, "main"):
            lighter, darker = sorted((ink, luminance(f"rgb{colour[:3]}")), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (scheme, colour)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.select("All layers", "All experts")
    assert "choose a layer, or an expert" in browser.text("legend")
    assert browser.complaints() == []


def luminance(colour: str) -> float:
    """WCAG's relative luminance of a computed colour, rgb() or color(srgb ...)."""
    scale = 1 if colour.startswith("color(srgb") else 255
    parts = [float(part) / scale for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_light_and_dark(browser: Browser) -> None:
    """The background follows the system, and every shade leaves the text readable (WCAG AA, 4.5 to 1)."""
    backgrounds = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        body = "getComputedStyle(document.body)"
        backgrounds[scheme] = luminance(browser.script(f"return {body}.backgroundColor"))
        ink = luminance(browser.script(f"return {body}.color"))
        for expert in ("All experts", "Expert 2"):
            browser.select("Layer 0", expert)
            for shade in set(browser.shades()):
                lighter, darker = sorted((ink, luminance(shade)), reverse=True)
                assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (scheme, shade)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert backgrounds["light"] > 0.9 and backgrounds["dark"] < 0.05


@pytest.mark.parametrize("width", [400, 1200])
def test_no_sideways_scrolling(browser: Browser, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.select("All layers", "All experts")
    assert browser.script("return document.documentElement.scrollWidth") <= width
    assert browser.script("return document.getElementById('picture').getBoundingClientRect().top") < 900
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
