"""What a page is asked about itself: scripts, and the contrast of two of its colours."""

import re


def luminance(colour):
    """Relative luminance by WCAG, of "rgb(r, g, b)"."""
    channels = [float(one) / 255 for one in re.findall(r"[0-9.]+", colour)[:3]]
    red, green, blue = (one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4 for one in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


OUTLINE = """() => {
  const style = getComputedStyle(document.activeElement);
  return style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth);
}"""

FOCUSED = """() => {
  const one = document.activeElement;
  const label = one.labels && one.labels.length ? one.labels[0].innerText : "";
  return (one.getAttribute("aria-label") || label || one.innerText || one.placeholder || "").trim();
}"""

CUT_OFF = """() => [...document.querySelectorAll("button, p, td, th, caption, h1, label")]
  .filter(one => one.offsetParent && one.scrollWidth > one.clientWidth + 1
    && getComputedStyle(one).display !== "inline" && getComputedStyle(one).overflowX !== "visible")
  .map(one => one.innerText)"""

SMALLEST_TEXT = """() => Math.min(100, ...[...document.querySelectorAll("svg.reward-plot text")]
  .filter(one => one.getBoundingClientRect().width > 0)
  .map(one => parseFloat(getComputedStyle(one).fontSize)
    * Math.hypot(one.getScreenCTM().a, one.getScreenCTM().b)))"""

CONTRAST = """() => {
  const luminance = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return luminance(colour);
    }
    return 1;
  };
  const texts = [...document.querySelectorAll(
    "h1, .reward-head p, .reward-muted, .reward-note, .reward-alert, .reward-number *, td, th, caption,"
    + " figcaption, summary, [role=tab], button.primary, .reward-examples button"
  )].filter(one => one.offsetParent);
  return Math.min(...texts.map(one => {
    const back = behind(one), front = luminance(getComputedStyle(one).color);
    return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  }));
}"""
