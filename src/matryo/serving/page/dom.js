// Elements made one by one: no text ever becomes markup.

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";
const fill = (element, attributes, children) => {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
};

export const h = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
export const s = (name, attributes, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

export const count = (n) => n.toLocaleString("en");
export const ms = (n) => (n < 10 ? n.toFixed(1) : n.toFixed(0)) + " ms";
export const size = (n) => (Number.isInteger(n) || n >= 100 ? count(Math.round(n)) : n.toFixed(1));
export const bytes = (n) => {
  const unit = ["B", "kB", "MB", "GB", "TB"];
  let k = 0;
  while (n >= 1000 && k < unit.length - 1) [n, k] = [n / 1000, k + 1];
  return `${n < 10 && k ? n.toFixed(1) : n.toFixed(0)} ${unit[k]}`;
};
export const ordinal = (n) => n + (["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] ?? "th");

// A sentence for those who do not see the page change; the last one said counts.
let timer;
export const say = (text) => {
  clearTimeout(timer);
  timer = setTimeout(() => ($("said").textContent = text), 700);
};

// Called when the browser is about to draw, once, however often it was asked for.
export const onFrame = (work) => {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      work();
    });
  };
};
