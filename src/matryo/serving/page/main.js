import { get, useKey } from "./api.js";
import { $, count } from "./dom.js";
import { start as startPairs } from "./pairs.js";
import { start as startQuality } from "./quality.js";
import { start as startSearch } from "./search.js";

const tabs = ["search", "quality", "pairs"];
const opened = {};
let model;

function fail(error) {
  $("alert").hidden = !error;
  $("alert").textContent = error?.message ?? "";
  if (error?.status === 401) askForKey(error);
}

function askForKey(error) {
  $("key").hidden = false;
  $("alert").hidden = !$("key-text").value;
  $("alert").textContent = error.message;
  for (const name of tabs) $(name).hidden = true;
  $("key-text").focus();
}

const starts = {
  search: () => startSearch(model, fail),
  quality: () => startQuality(model, $("quality")),
  pairs: () => startPairs(model, fail),
};

async function open(name) {
  for (const one of tabs) {
    $(one).hidden = one !== name;
    $(`tab-${one}`).setAttribute("aria-selected", String(one === name));
    $(`tab-${one}`).tabIndex = one === name ? 0 : -1;
  }
  if (!model) return;
  try {
    await (opened[name] ??= starts[name]());
  } catch (error) {
    delete opened[name];
    fail(error);
  }
}

const wanted = () => (tabs.includes(location.hash.slice(1)) ? location.hash.slice(1) : "search");

for (const [n, name] of tabs.entries()) {
  const tab = $(`tab-${name}`);
  tab.addEventListener("click", () => {
    history.replaceState(null, "", `#${name}`);
    open(name);
  });
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: n + 1, ArrowLeft: n + tabs.length - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = $(`tab-${tabs[to % tabs.length]}`);
    next.focus();
    next.click();
  });
}

async function begin() {
  try {
    model = (await get("/v1/models")).data[0];
  } catch (error) {
    open(wanted());
    return fail(error);
  }
  fail();
  $("key").hidden = true;
  $("served").textContent = `${model.id}, ${count(model.embedding_size)} dimensions, ${model.backend}`;
  document.title = `${model.id} · Matryo`;
  await open(wanted());
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key-text").value);
  begin();
});
addEventListener("hashchange", () => open(wanted()));
addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select");
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || $("search").hidden) return;
  event.preventDefault();
  $("query").focus();
});
begin();
