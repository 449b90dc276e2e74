import { get } from "./api.js";
import { bytes, count, h, ms, size } from "./dom.js";
import { plot, table } from "./plot.js";

export async function start(model, holder) {
  holder.replaceChildren(...curves(model), ...(await frontier()));
}

function curves(model) {
  const groups = new Map();
  for (const score of model.quality) {
    const name = `${score.metric}${score.task ? " on " + score.task : ""}`;
    groups.set(name, [...(groups.get(name) ?? []), score]);
  }
  const title = h("h2", { class: "first" }, "What each width keeps");
  if (!groups.size)
    return [title, h("p", {}, `Nothing was measured of ${model.id} yet. What matryo train or matryo demo measured at each width is kept with the model and shown here.`)];
  const intro = h("p", { class: "note" }, "Measured once, kept with the model. Each code stores the same prefix in another number of bytes.");
  return [title, intro, ...[...groups].flatMap(([name, scores], n) => {
    const codes = [...new Set(scores.map((score) => score.code))];
    const widths = [...new Set(scores.map((score) => score.width))].sort((a, b) => a - b);
    const at = (code, width) => scores.find((score) => score.code === code && score.width === width);
    const series = codes.map((code) => ({
      name: code,
      points: widths.map((width) => at(code, width)).filter(Boolean).map(({ width, value, low, high }) => [width, value, low, high]),
    }));
    const full = widths.at(-1);
    const rows = widths.map((width) => [count(width), ...codes.flatMap((code) => {
      const one = at(code, width), top = at(codes[0], full);
      return one ? [`${one.value.toFixed(3)} (${Math.round((100 * one.value) / top.value)} %)`] : ["–"];
    })]);
    return [
      groups.size > 1 && h("h3", {}, name),
      plot({ label: `${name} against width; the table below has every number`, caption: `${name} against width. Percentages in the table are of ${codes[0]} at ${full}.`,
        x: { title: "width", log: true, ticks: widths }, y: { title: name }, series }),
      table(`${name} by width`, ["width", ...codes], rows),
    ].filter(Boolean);
  })];
}

async function frontier() {
  const title = h("h2", {}, "What the planner found");
  let index;
  try {
    index = await get("/v1/index");
  } catch (error) {
    if (error.code !== "no_index") throw error;
  }
  const found = index?.plans;
  if (!found) {
    const now = index && h("p", {}, "This index is searched by ", h("code", {}, index.plan), ".");
    return [title, now, h("p", {}, "To see which plans reach a recall, and what they cost, measure them on your vectors and name the file when you serve:"),
      h("pre", { tabindex: 0, role: "region", "aria-label": "Commands" }, h("code", {}, "matryo plan vectors.npy queries.npy --out plans.json\nmatryo serve MODEL --index docs.matryo --plans plans.json"))].filter(Boolean);
  }
  const plans = found.plans;
  const lead = `Plans expected to reach recall@${found.k} of ${found.recall} on ${count(found.items)} items. No other that was measured needs as few bytes and is as quick.`;
  const first = (plan) => plan.split(" ")[0];
  const points = plans.filter((one) => one.bytes_per_item > 0).sort((a, b) => a.bytes_per_item - b.bytes_per_item)
    .map((one) => [one.bytes_per_item, one.ms, null, null, first(one.plan), one.best]);
  const rows = plans.map((one) => [one.plan, one.recall.toFixed(4), one.at_least.toFixed(4), one.bytes_per_item == null ? "–" : size(one.bytes_per_item),
    ms(one.ms), bytes(one.memory_bytes), one.best ? "recommended" : ""]);
  return [title, h("p", { class: "note" }, lead),
    points.length && plot({ label: "Milliseconds of one search against bytes an item; the table below has every number",
      caption: "Each mark is a plan, named by its first stage; the large one is recommended.",
      x: { title: "bytes in memory an item", log: true, pad: 0.08 }, y: { title: "milliseconds of one search", log: true }, series: [{ points, faint: true }] }),
    table("Plans", ["plan", "recall", "at least", "bytes an item", "time", "memory", ""], rows)].filter(Boolean);
}
