import { encode } from "./api.js";
import { $, h, onFrame, say } from "./dom.js";
import { plot, table } from "./plot.js";
import { stopsOf } from "./ruler.js";

const MOST = 6;
const PAUSE = 200;
const FIRST = [
  ["a puzzle game for the terminal", "text mode game of sliding tiles"],
  ["a puzzle game for the terminal", "jigsaw puzzles for children"],
  ["a puzzle game for the terminal", "library that decodes images"],
];

let model, fail, pairs;
let known = new Map(); // text -> its vector
let leaving = new AbortController();

export function start(described, showError) {
  [model, fail] = [described, showError];
  pairs = FIRST.map((pair) => [...pair]);
  $("add-pair").addEventListener("click", () => {
    pairs.push(["", ""]);
    rows();
    $("pair-rows").lastElementChild.querySelector("input").focus();
  });
  rows();
  return update();
}

function rows() {
  $("pair-rows").replaceChildren(...pairs.map((pair, n) => {
    const field = (side, name) => h("input", { value: pair[side], "aria-label": `Pair ${n + 1}, ${name} text`, maxlength: 2000, spellcheck: "false",
      oninput: (event) => { pair[side] = event.target.value; later(); } });
    return h("div", { class: `pair s${n % 6}`, role: "group", "aria-label": `Pair ${n + 1}` },
      h("span", { class: "number", "aria-hidden": "true" }, n + 1), field(0, "first"), field(1, "second"),
      h("button", { type: "button", class: "plain", "aria-label": `Remove pair ${n + 1}`, disabled: pairs.length === 1,
        onclick: () => { pairs.splice(n, 1); rows(); update(); $("add-pair").focus(); } }, "×"));
  }));
  $("add-pair").disabled = pairs.length >= MOST;
}

let timer;
const later = () => {
  clearTimeout(timer);
  timer = setTimeout(update, PAUSE);
};

async function update() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const texts = [...new Set(pairs.flat().map((text) => text.trim()).filter(Boolean))];
  const fresh = texts.filter((text) => !known.has(text));
  try {
    if (fresh.length) {
      const { vectors } = await encode(model.id, fresh, {}, signal);
      fresh.forEach((text, n) => known.set(text, vectors[n].numbers));
      if (known.size > 200) known = new Map([...known].slice(-100));
    }
    fail();
    draw();
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  }
}

// Cosines of every prefix in one pass: the sums of width d are those of d - 1 and one more product each.
export function cosines(a, b) {
  const found = new Float64Array(a.length);
  let [dot, aa, bb] = [0, 0, 0];
  for (let d = 0; d < a.length; d++) {
    dot += a[d] * b[d];
    aa += a[d] * a[d];
    bb += b[d] * b[d];
    found[d] = aa && bb ? dot / Math.sqrt(aa * bb) : 0;
  }
  return found;
}

const draw = onFrame(() => {
  const full = model.embedding_size;
  const stops = stopsOf(full, model.matryoshka_dimensions);
  const trained = [...new Set([...model.matryoshka_dimensions, full])].sort((a, b) => a - b);
  const whole = pairs.map((pair, n) => [n, pair.map((text) => known.get(text.trim()))]).filter(([, [a, b]]) => a && b);
  if (!whole.length) {
    $("pair-plot").replaceChildren(h("p", { class: "hint" }, "Two texts make a pair."));
    $("pair-table").replaceChildren();
    return;
  }
  const curves = whole.map(([n, [a, b]]) => [n, cosines(a, b)]);
  const series = curves.map(([n, curve]) => ({ name: `pair ${n + 1}`, hue: n, points: stops.map((width) => [width, curve[width - 1]]) }));
  const spec = { label: "Cosine of each pair at every width; the table below has those of the trained widths", caption: "Cosine against width, on a scale where every doubling takes the same room.",
    x: { title: "width", log: true, ticks: trained }, y: { title: "cosine" }, series };
  $("pair-plot").replaceChildren(plot(spec));
  $("pair-table").replaceChildren(table("Cosine of each pair by width", ["width", ...curves.map(([n]) => `pair ${n + 1}`)],
    trained.map((width) => [String(width), ...curves.map(([, curve]) => curve[width - 1].toFixed(3))])));
  say(curves.map(([n, curve]) => `Pair ${n + 1}: ${curve[trained[0] - 1].toFixed(2)} at ${trained[0]}, ${curve[full - 1].toFixed(2)} at ${full}.`).join(" "));
});
