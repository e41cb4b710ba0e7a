"""The page on which the results of a search can be looked at, by any cost, without anything from elsewhere."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from efficient_lm.training.reporting import finite


def page(found: Mapping[str, Any], labels: Mapping[str, Any], names: Sequence[str]) -> str:
    """HTML that holds its data, style and script.

    Args:
        found: what ``pareto.json`` has.
        labels: of `costs` by name, and of the `fitness`.
        names: of each submodel.
    """
    data = {**found, "labels": labels, "names": names}
    text = json.dumps(finite(data), allow_nan=False)
    # Inside a script nothing may look like its end.
    return _PAGE.replace("%DATA%", text.replace("<", "\\u003c"))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Submodels</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
  svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: #555; }
  .grid { stroke: #e4e4e4; } .budget { stroke: #c44e52; stroke-dasharray: 5 4; }
  .front { fill: none; stroke: #4c72b0; stroke-width: 1.5; }
  circle { fill: #aaa; cursor: pointer; } circle.best { fill: #4c72b0; }
  circle.uniform { stroke: #dd8452; stroke-width: 3; } circle.chosen { fill: #c44e52; }
  circle.marked { stroke: #000; stroke-width: 2; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; padding: .2rem .5rem; border-bottom: 1px solid #eee; } th { cursor: pointer; }
  th:last-child, td:last-child { text-align: left; font-family: monospace; } tr.marked { background: #eef3fa; }
  label { margin-right: 1.2rem; } #shown { min-height: 1.5em; font-family: monospace; }
</style>
</head>
<body>
<h1>Submodels</h1>
<p>
  <label>against <select id="cost"></select></label>
  <label><input type="checkbox" id="only"> only the best and those of one granularity</label>
</p>
<svg id="plot" viewBox="0 0 860 420" role="img"></svg>
<p id="shown">Blue: the best of their size. Ringed: one granularity. Red: chosen.</p>
<table id="table"></table>
<script>
const data = %DATA%;
const costs = data.labels.costs, fitness = data.fitness;
const rows = data.submodels.map((row, index) => ({...row, name: data.names[index]}));
const select = document.getElementById("cost"), only = document.getElementById("only");
const plot = document.getElementById("plot"), table = document.getElementById("table");
let order = {key: data.cost, sign: 1}, marked = null;

for (const [name, label] of Object.entries(costs)) select.add(new Option(label, name, false, name === data.cost));

function front(cost) {
  let least = Infinity;
  const sorted = rows.filter(row => row[fitness] !== null)
    .sort((a, b) => a[cost] - b[cost] || a[fitness] - b[fitness]);
  return sorted.filter(row => row[fitness] < least && ((least = row[fitness]), true));
}
function figure(value) {
  if (value === null) return "";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(5));
}
function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  plot.append(made);
  return made;
}
function scale(values, from, to) {
  const low = Math.min(...values), span = Math.max(...values) - low || 1;
  return {at: value => from + (value - low) / span * (to - from),
          ticks: [0, 1, 2, 3, 4].map(step => low + span * step / 4)};
}
function draw() {
  const cost = select.value, best = new Set(front(cost));
  const shown = rows.filter(row => !only.checked || best.has(row) || row.uniform || row.chosen);
  const points = shown.filter(row => row[fitness] !== null);
  const limit = data.budget[cost];
  plot.replaceChildren();
  const x = scale(points.map(row => row[cost]).concat(limit ? [limit] : []), 80, 830);
  const y = scale(points.map(row => row[fitness]), 360, 20);
  for (const tick of x.ticks) {
    element("line", {class: "grid", x1: x.at(tick), x2: x.at(tick), y1: 20, y2: 360});
    element("text", {x: x.at(tick), y: 380, "text-anchor": "middle"}, figure(tick));
  }
  for (const tick of y.ticks) {
    element("line", {class: "grid", x1: 80, x2: 830, y1: y.at(tick), y2: y.at(tick)});
    element("text", {x: 72, y: y.at(tick) + 4, "text-anchor": "end"}, figure(tick));
  }
  element("text", {x: 455, y: 408, "text-anchor": "middle"}, costs[cost]);
  element("text", {x: 80, y: 12}, data.labels.fitness);
  if (limit) element("line", {class: "budget", x1: x.at(limit), x2: x.at(limit), y1: 20, y2: 360});
  const line = [...best].map(row => x.at(row[cost]) + "," + y.at(row[fitness])).join(" ");
  element("polyline", {class: "front", points: line});
  for (const row of points) {
    const kinds = ["uniform", "chosen"].filter(kind => row[kind]);
    if (best.has(row)) kinds.push("best");
    if (row === marked) kinds.push("marked");
    const dot = element("circle", {class: kinds.join(" "), cx: x.at(row[cost]), cy: y.at(row[fitness]), r: 5});
    dot.addEventListener("mouseenter", () => {
      const costed = Object.keys(costs).map(name => costs[name] + " " + figure(row[name])).join(", ");
      document.getElementById("shown").textContent = `${row.name}: ${fitness} ${figure(row[fitness])}, ${costed}`;
    });
    dot.addEventListener("click", () => { marked = row; draw(); });
  }
  list(shown, best);
}
function list(shown, best) {
  const keys = [...Object.keys(costs), fitness, "name"];
  const head = document.createElement("tr");
  for (const key of keys) {
    const cell = document.createElement("th");
    cell.textContent = costs[key] || (key === "name" ? "submodel" : key);
    cell.addEventListener("click", () => {
      order = {key, sign: order.key === key ? -order.sign : 1};
      draw();
    });
    head.append(cell);
  }
  const sorted = [...shown].sort((a, b) => order.sign * (a[order.key] > b[order.key] ? 1 : -1));
  table.replaceChildren(head, ...sorted.map(row => {
    const line = document.createElement("tr");
    line.className = row === marked ? "marked" : "";
    for (const key of keys) {
      const cell = document.createElement("td");
      cell.textContent = key === "name" ? row.name : figure(row[key]);
      if (best.has(row)) cell.style.fontWeight = "600";
      line.append(cell);
    }
    line.addEventListener("click", () => { marked = row; draw(); });
    return line;
  }));
}
select.addEventListener("change", draw);
only.addEventListener("change", draw);
draw();
</script>
</body>
</html>
"""
