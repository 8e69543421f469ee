"""What of a page cannot be read well, for a browser to tell."""

# Text whose contrast to what is behind it is below 4.5, the limit of WCAG 2 for level AA.
LOW_CONTRAST = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const [r, g, b] = colour.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
  };
  const texts = [...document.querySelectorAll("body *")].filter(element =>
    !["title", "desc"].includes(element.tagName) &&
    [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()));
  return [texts.length, texts.filter(element => {
    const style = getComputedStyle(element);
    const front = parse(element instanceof SVGElement ? style.fill : style.color);
    const [low, high] = [luminance(front), luminance(behind(element))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05) < 4.5;
  }).map(element => element.textContent)];
}"""
