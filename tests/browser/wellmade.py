"""What makes a page well made, and a keyboard to walk it with."""

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

WIDTHS = (360, 768, 1440)
TYPE = {"14px", "18px", "28px"}
FONT_SIZES = """() => {
  const sizes = new Set();
  for (const element of document.querySelectorAll('.gradio-container *'))
    if (element.getClientRects().length && [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
      sizes.add(getComputedStyle(element).fontSize);
  return [...sizes].sort();
}"""
MARK = "() => document.addEventListener('focusin', event => { event.target.dataset.reached = '1'; })"
UNREACHED = """() => {
  const seen = element => element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && element.getClientRects().length;
  const group = element => (element.type === 'radio' ? document.querySelectorAll(`input[name="${element.name}"]`) : [element]);
  return [...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex="0"]')]
    .filter(element => seen(element) && !element.disabled && element.tabIndex >= 0 && !element.closest('[inert]'))
    .filter(element => ![...group(element)].some(each => each.dataset.reached))
    .map(element => element.outerHTML.slice(0, 160));
}"""
MOST_KEYS = 250


def faults_of(page: Page, width: int) -> list[str]:
    """What a page does wrong at a width: it runs over, has more than three sizes of type, or locks somebody out."""
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(300)
    found = []
    if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
        found.append(f"{wide} px wide at {width}")
    if odd := set(page.evaluate(FONT_SIZES)) - TYPE:
        found.append(f"type of {', '.join(sorted(odd))}")
    for each in Axe().run(page).response["violations"]:
        if each["impact"] in ("serious", "critical"):
            found += [f"{each['id']} at {width}: {node['html'][:200]}" for node in each["nodes"]]
    return found


def unreached(page: Page) -> list[str]:
    """What can be operated and the Tab key does not come to, after a walk through the whole page."""
    page.evaluate(MARK)
    left: list[str] = []
    for walk in range(4):  # the first starts where a person was last; what was redrawn in the middle of one gets another
        for _ in range(MOST_KEYS):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                break
        left = page.evaluate(UNREACHED)
        if walk and not left:
            break
    return left


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until the focus is there."""
    for _ in range(MOST_KEYS):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not reached by the Tab key")
