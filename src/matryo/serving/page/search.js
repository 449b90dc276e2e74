import { encode, get, post } from "./api.js";
import { $, bytes, count, h, ms, onFrame, ordinal, s, say, size } from "./dom.js";
import { drawVector, labelled, place, stopsOf } from "./ruler.js";

const SHOWN = 10;
const DEPTH = 50; // ranks known beyond those shown, so that what left the list can be told where it went
const PAUSE = 90; // milliseconds without a key before a text is encoded

const calm = matchMedia("(prefers-reduced-motion: reduce)");
let model, index, stops, fail;
let width, depth, text = "", vector, full, planned, shown;
let answers = new Map(); // width -> answer, of this query
let leaving = new AbortController();
let busy = false, since = 0;

export async function start(described, showError) {
  [model, fail] = [described, showError];
  try {
    index = await get("/v1/index");
  } catch (error) {
    if (error.code !== "no_index") throw error;
    $("how-to").textContent =
      `matryo index build corpus.jsonl.gz --model ${model.id} --out docs.matryo\nmatryo serve ${model.id} --index docs.matryo`;
    $("no-index").hidden = false;
    return;
  }
  $("searching").hidden = false;
  $("query").placeholder = `Search ${count(index.items)} items`;
  stops = stopsOf(index.width, model.matryoshka_dimensions, model.any_width ? null : widths());
  width = stops.reduce((best, stop) => (Math.abs(Math.log(stop * 8 / index.width)) < Math.abs(Math.log(best * 8 / index.width)) ? stop : best));
  const range = $("width");
  range.max = stops.length - 1;
  range.value = stops.indexOf(width);
  range.addEventListener("input", () => move(stops[range.value]));
  range.addEventListener("keydown", leap);
  $("query").addEventListener("input", typed);
  $("query").addEventListener("search", typed);
  if (model.depths.length > 1) startDepth();
  new ResizeObserver(onFrame(layout)).observe($("searching"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onFrame(layout));
  describe();
  warm();
  if (matchMedia("(hover: hover)").matches && !$("search").hidden) $("query").focus();
}

// A search before the first: what the server reads and builds on first use is not the first reader's wait.
async function warm() {
  const asked = { vector: [1, ...Array(index.width - 1).fill(0)], k: SHOWN };
  try {
    for (const more of [{}, { dimensions: index.width }, { dimensions: width }]) await post("/v1/search", { ...asked, ...more });
  } catch {
    // The first search says what is wrong.
  }
}

const widths = () => [...new Set([...model.matryoshka_dimensions, index.width])].sort((a, b) => a - b);

function startDepth() {
  const range = $("depth");
  depth = model.depths.at(-1);
  [range.max, range.value] = [model.depths.length - 1, model.depths.length - 1];
  const told = () => {
    $("depth-out").textContent = `${depth} of ${model.depths.at(-1)}`;
    range.setAttribute("aria-valuetext", `${depth} layers of ${model.depths.at(-1)}`);
  };
  range.addEventListener("input", () => {
    depth = model.depths[range.value];
    told();
    lookUp();
  });
  told();
  $("depth-row").hidden = false;
}

// Page Up and Page Down: the next width the model was trained for.
function leap(event) {
  const step = { PageUp: 1, PageDown: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const among = step > 0 ? widths() : widths().reverse();
  const next = among.find((one) => (one - width) * step > 0);
  if (next === undefined) return;
  $("width").value = stops.indexOf(next);
  move(next);
}

function move(to) {
  if (to === width) return;
  width = to;
  since = performance.now();
  describe();
  if (vector) fetchNarrow();
}

let typing;
function typed() {
  const now = $("query").value.trim();
  if (now === text) return;
  text = now;
  clearTimeout(typing);
  typing = setTimeout(lookUp, PAUSE);
}

async function lookUp() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  if (!text) {
    [vector, full, planned, shown] = [];
    answers = new Map();
    describe();
    $("found").hidden = true;
    $("hint").hidden = false;
    return;
  }
  try {
    const { vectors, timing } = await encode(model.id, [text], { input_type: "query", ...(depth && { depth }) }, signal);
    const asked = { vector: vectors[0].coded };
    // One after another: at the same time each would be timed with the others' load on it.
    const whole = await search({ ...asked, k: DEPTH, dimensions: index.width }, signal);
    const byPlan = await search({ ...asked, k: SHOWN }, signal);
    const narrow = await search({ ...asked, k: DEPTH, dimensions: width }, signal);
    [vector, full, planned] = [vectors[0], whole, byPlan];
    answers = new Map([[index.width, whole], [narrow.width, narrow]]);
    vector.encoding = (timing.queue ?? 0) + (timing.model ?? 0);
    if (index.plan_bytes_per_item == null) index = await get("/v1/index");
    fail();
    since = 0;
    if (answers.has(width)) show(width);
    else fetchNarrow();
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  }
}

async function search(asked, signal) {
  const { content, timing } = await post("/v1/search", asked, signal);
  return { hits: content.data[0].hits, took: timing.search, plan: content.plan, width: asked.dimensions };
}

// One search at a time: the slider may pass widths quicker than they are searched, and only where it is now matters.
const fetchNarrow = onFrame(async () => {
  if (answers.has(width)) return show(width);
  if (busy) return;
  busy = true;
  const { signal } = leaving;
  try {
    const found = await search({ vector: vector.coded, k: DEPTH, dimensions: width }, signal);
    if (signal.aborted) return;
    answers.set(found.width, found);
    fail();
    show(found.width);
  } catch (error) {
    if (error.name !== "AbortError") return fail(error);
  } finally {
    busy = false;
  }
  if (vector && shown !== width) fetchNarrow();
});

// What the slider says at once, before any answer.
function describe() {
  const less = index.width / width;
  const trained = model.matryoshka_dimensions.includes(width);
  $("width-out").textContent = count(width);
  $("width-of").textContent = `of ${count(index.width)} dimensions${trained ? ", trained" : ""}`;
  $("width").setAttribute("aria-valuetext", `${width} of ${index.width} dimensions${trained ? ", trained" : ""}`);
  $("saving").textContent =
    `${bytes(4 * width)} an item as float32` + (less > 1 ? `, ${less < 10 ? +less.toFixed(1) : Math.round(less)} times smaller` : "");
  drawVector($("vector"), stops, width, vector?.numbers);
}

function layout() {
  const ticks = $("ticks");
  const labels = labelled(stops, widths(), ticks.clientWidth);
  ticks.replaceChildren(...labels.map(({ width: one }) => h("span", {}, String(one))));
  labels.forEach(({ at }, n) => (ticks.children[n].style.left = `${100 * at}%`));
  const unit = $("vector").clientWidth / stops.length;
  const range = $("width");
  range.style.left = `${unit - 12}px`;
  range.style.width = `${$("vector").clientWidth - unit + 24}px`;
  describe();
  if (shown) connect();
}

function show(at) {
  const narrow = answers.get(at);
  shown = at;
  $("hint").hidden = true;
  $("found").hidden = false;
  const ids = (answer) => new Map(answer.hits.map((hit, n) => [hit.id, n + 1]));
  const [here, there] = [ids(narrow), ids(full)];
  const among = (answer) => answer.hits.slice(0, SHOWN).filter((hit) => there.get(hit.id) <= SHOWN).length;
  const most = Math.min(SHOWN, full.hits.length);

  $("ways").replaceChildren(
    way(at === index.width ? "the full width" : `the first ${at}`, narrow.plan, 4 * at, narrow.took, among(narrow), most, true),
    way("the index’s own plan", index.plan, index.plan_bytes_per_item, planned.took, among(planned), most),
    way(`all ${index.width}`, full.plan, 4 * index.width, full.took, most, most),
  );
  $("narrow-title").textContent = at === index.width ? "Full width" : `First ${count(at)} dimensions`;
  $("full-title").textContent = `All ${count(index.width)}`;
  list($("narrow"), narrow.hits.slice(0, SHOWN), (hit, n) => moved(n, there.get(hit.id)));
  list($("full"), full.hits.slice(0, SHOWN), (hit) => whereabouts(here.get(hit.id)));
  describe();
  connect();

  const later = since && performance.now() - since;
  if (since) performance.measure("slide-to-result", { start: since, end: performance.now() });
  since = 0;
  $("timing").textContent =
    `Times are this search’s, on the server. Encoding the query took ${ms(vector.encoding)}, once for every width` +
    (later ? `; this list came ${ms(later)} after the slider moved.` : ".");
  say(`${among(narrow)} of the first ${most} at ${at} dimensions are those of the full width. ${4 * at} bytes an item.`);
}

function way(name, plan, each, took, same, most, chosen) {
  const dots = s("svg", { viewBox: `0 0 ${most * 8} 8`, class: "dots", width: most * 8, height: 8, "aria-hidden": "true" });
  for (let n = 0; n < most; n++) dots.append(s("circle", { cx: 8 * n + 4, cy: 4, r: 2.7, class: n < same ? "on" : "off" }));
  return h("tr", { class: chosen && "chosen" },
    h("th", { scope: "row" }, name, h("span", { class: "plan" }, plan)),
    h("td", {}, each == null ? "–" : size(each)), h("td", {}, ms(took)),
    h("td", { class: "agree" }, dots, `${same} of ${most}`));
}

// In words and sign; colour only repeats it.
function moved(n, before) {
  if (before === undefined) return ["in", `+ new, beyond ${DEPTH}th at full width`];
  if (before > SHOWN) return ["in", `+ new, ${ordinal(before)} at full width`];
  if (before === n) return ["same", "= same place"];
  return before > n ? ["up", `▲ ${before - n} higher`] : ["down", `▼ ${n - before} lower`];
}

function whereabouts(now) {
  if (now === undefined) return ["out", `− gone, beyond ${DEPTH}th`];
  return now > SHOWN ? ["out", `− gone, ${ordinal(now)}`] : ["kept", `${ordinal(now)} of the narrow`];
}

function list(element, hits, mark) {
  const rows = new Map([...element.children].map((row) => [row.dataset.id, row]));
  const before = new Map([...rows].map(([id, row]) => [id, row.offsetTop]));
  const kept = hits.map((hit, n) => {
    const row = rows.get(hit.id) ?? item(hit);
    const [kind, words] = mark(hit, n + 1);
    row.dataset.kind = kind;
    row.querySelector(".rank").textContent = n + 1;
    row.querySelector(".mark").textContent = words;
    row.querySelector(".score").textContent = hit.score.toFixed(3);
    return row;
  });
  element.replaceChildren(...kept);
  if (calm.matches || !before.size) return;
  for (const row of kept) {
    const from = before.get(row.dataset.id);
    if (from === undefined) row.animate([{ opacity: 0 }, { opacity: 1 }], 160);
    else if (from !== row.offsetTop)
      row.animate([{ transform: `translateY(${from - row.offsetTop}px)` }, {}], { duration: 160, easing: "ease-out" });
  }
}

function item(hit) {
  const words = (hit.document ?? hit.id).trim();
  const more = Object.entries(hit.metadata ?? {}).slice(0, 2).map(([name, value]) => `${name} ${value}`);
  return h("li", { "data-id": hit.id },
    h("span", { class: "rank", "aria-hidden": "true" }),
    h("div", { class: "body" },
      h("p", { class: "text", title: words.slice(0, 600) }, words.slice(0, 300)),
      h("p", { class: "facts" }, h("span", { class: "mark" }), h("span", { class: "score" }),
        h("span", { class: "id" }, hit.document == null ? "" : hit.id), more.map((one) => h("span", { class: "more" }, one)))));
}

// A line from each item's place on the left to its place on the right.
function connect() {
  const moves = $("moves");
  const [width, height] = [moves.clientWidth, $("full").offsetHeight];
  if (!width) return;
  moves.setAttribute("viewBox", `0 0 ${width} ${height}`);
  moves.style.height = `${height}px`;
  const middles = (element) => new Map([...element.children].map((row) => [row.dataset.id, row.offsetTop + row.offsetHeight / 2]));
  const [left, right] = [middles($("narrow")), middles($("full"))];
  const lines = [...left].filter(([id]) => right.has(id)).map(([id, y]) => {
    const to = right.get(id);
    return s("path", { class: y === to ? "same" : y < to ? "up" : "down", d: `M0 ${y}C${width / 2} ${y} ${width / 2} ${to} ${width} ${to}` });
  });
  const stubs = (side, x, ends) => [...side].filter(([id]) => !ends.has(id)).map(([, y]) => s("circle", { cx: x, cy: y, r: 3 }));
  moves.replaceChildren(...lines, ...stubs(left, 4, right), ...stubs(right, width - 4, left));
}
