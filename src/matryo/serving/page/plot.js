// Small charts in the page's colours, drawn at the size they are shown in, so that their text is readable anywhere.
import { h, onFrame, s } from "./dom.js";

const TOP = 14, BOTTOM = 40, LEFT = 46, CHARACTER = 7.2;

// spec: { label, x: {values, ticks, title, log}, y: {title, log}, series: [{name, points: [[x, y, low, high]], dots}], mark }
export function plot(spec) {
  const holder = h("figure", { class: "plot" });
  const caption = h("figcaption", {}, spec.caption);
  holder.append(caption);
  new ResizeObserver(onFrame(() => {
    const width = holder.clientWidth;
    if (!width) return;
    holder.replaceChildren(drawn(spec, width), caption);
  })).observe(holder);
  return holder;
}

function drawn(spec, width) {
  const height = Math.max(240, Math.min(360, width * 0.5));
  const names = spec.series.map(({ name, points }) => [name ?? "", points.at(-1)]);
  const right = 14 + CHARACTER * Math.max(...names.map(([name]) => Math.min(name.length, 22)));
  const points = spec.series.flatMap((series) => series.points);
  const x = scale(points.map((p) => p[0]), spec.x.log, LEFT, width - right, spec.x.pad);
  const y = scale(points.flatMap((p) => p.slice(1, 4).filter((v) => v != null)), spec.y.log, height - BOTTOM, TOP + 16, 0.06);
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": spec.label });
  for (const tick of ticks(y, spec.y.log))
    svg.append(s("line", { class: "grid", x1: LEFT, x2: width - right, y1: y(tick), y2: y(tick) }), words(LEFT - 8, y(tick) + 4, short(tick), "end"));
  svg.append(words(0, 10, spec.y.title, "start"), words((LEFT + width - right) / 2, height - 4, spec.x.title, "middle"));
  let last = -1e9;
  for (const tick of spec.x.ticks ?? ticks(x, spec.x.log))
    if (x(tick) - last > 34) {
      svg.append(words(x(tick), height - BOTTOM + 18, short(tick), "middle"));
      last = x(tick);
    }
  const ends = [], under = s("g");
  svg.append(under);
  spec.series.forEach((series, n) => {
    const group = s("g", { class: `series s${n % 6}` });
    const path = series.points.map((p) => `${x(p[0])} ${y(p[1])}`).join("L");
    if (series.points.every((p) => p[2] != null)) {
      const back = [...series.points].reverse().map((p) => `${x(p[0])} ${y(p[2])}`).join("L");
      group.append(s("path", { class: "band", d: `M${series.points.map((p) => `${x(p[0])} ${y(p[3])}`).join("L")}L${back}Z` }));
    }
    if (series.points.length > 1) group.append(s("path", { class: series.faint ? "line faint" : "line", d: `M${path}` }));
    if (series.points.length < 40)
      for (const p of series.points) {
        group.append(s("circle", { cx: x(p[0]), cy: y(p[1]), r: p[5] ? 6 : 3.2 }, s("title", {}, p[4] ?? `${series.name} ${short(p[0])}: ${short(p[1])}`)));
        const side = x(p[0]) > width / 2 ? -1 : 1;
        if (p[4]) group.append(words(x(p[0]) + 12 * side, y(p[1]) + 4, p[4], side < 0 ? "end" : "start"));
      }
    under.after(group); // the first series lies on top
    if (series.name) ends.push({ group, name: series.name, y: y(series.points.at(-1)[1]) });
  });
  let floor = 0;
  for (const end of ends.sort((a, b) => a.y - b.y)) {
    floor = Math.max(end.y, floor + 15);
    const text = end.name.length > 22 ? end.name.slice(0, 21) + "…" : end.name;
    end.group.append(words(width - right + 8, floor + 4, text, "start"));
  }
  return svg;
}

const words = (x, y, text, anchor) => s("text", { x, y, "text-anchor": anchor }, text);
const short = (n) => (Math.abs(n) >= 1000 ? n.toLocaleString("en") : String(+n.toPrecision(3)));

function scale(values, log, from, to, margin = 0) {
  const of = log ? Math.log2 : (v) => v;
  let [low, high] = [Math.min(...values), Math.max(...values)].map(of);
  if (high - low < 1e-9) [low, high] = [low - (log ? 1 : 0.1), high + (log ? 1 : 0.1)];
  [low, high] = [low - margin * (high - low), high + margin * (high - low)];
  const place = (v) => from + ((of(v) - low) / (high - low)) * (to - from);
  return Object.assign(place, { low: log ? 2 ** low : low, high: log ? 2 ** high : high });
}

function ticks({ low, high }, log) {
  const found = [];
  if (log) {
    const step = Math.max(1, Math.ceil(Math.log2(high / low) / 6));
    for (let n = Math.ceil(Math.log2(low)); n <= Math.log2(high); n += step) found.push(2 ** n);
    return found;
  }
  const rough = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * unit >= rough) * unit;
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) found.push(Math.round(v / step) * step);
  return found;
}

export function table(label, heads, rows) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label },
    h("table", {}, h("caption", { class: "sr" }, label),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, n) => h(n ? "td" : "th", n ? {} : { scope: "row" }, cell)))))));
}
