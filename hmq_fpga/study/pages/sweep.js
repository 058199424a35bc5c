"use strict";
// Draws the chart of `#explorer` from the JSON in `#data`: axes by choice, runs, ranges over seeds, the front.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const figure = document.getElementById("chart");
  const detail = document.getElementById("detail");
  const choices = { x: document.getElementById("x"), y: document.getElementById("y") };
  const methods = [...new Set(data.groups.map((group) => group.method))];
  const colour = (group) => data.palette[methods.indexOf(group.method) % data.palette.length];
  const label = (key) => data.axes.find((axis) => axis.key === key).label;
  const number = (value) =>
    value.toLocaleString("en", Number.isInteger(value) ? {} : { maximumSignificantDigits: 4 });

  function element(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function ticks(low, high, most) {
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
    const found = [];
    for (let n = Math.ceil(low / step); n * step <= high; n += 1) found.push(Number((n * step).toPrecision(12)));
    return found;
  }

  function scale(values, from, to) {
    let low = Math.min(...values), high = Math.max(...values);
    const margin = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
    low -= margin;
    high += margin;
    const at = (value) => from + ((value - low) / (high - low)) * (to - from);
    return { at, low, high };
  }

  function show(run) {
    detail.replaceChildren();
    const link = document.createElement("a");
    link.href = run.link;
    link.textContent = run.name;
    detail.append(link, run.parity ? " · bit-exact" : " · NOT bit-exact");
    for (const axis of data.axes)
      if (axis.key in run.values) detail.append(` · ${axis.label} ${number(run.values[axis.key])}`);
  }

  function draw() {
    const x = choices.x.value, y = choices.y.value;
    const width = Math.max(300, Math.min(figure.clientWidth || 640, 760)), height = Math.round(width * 0.3 + 190);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    svg.append(element("title", {}, `${label(y)} against ${label(x)}`));
    const runs = data.runs.filter((run) => x in run.values && y in run.values);
    figure.replaceChildren(svg);
    if (!runs.length) {
      svg.append(element("text", { x: 10, y: 30 }, "No run has both figures."));
      return;
    }
    const box = { left: 62, right: width - 10, top: 12, bottom: height - 44 };
    const across = scale(runs.map((run) => run.values[x]), box.left, box.right);
    const up = scale(runs.map((run) => run.values[y]), box.bottom, box.top);
    for (const value of ticks(across.low, across.high, Math.floor(width / 90))) {
      const at = across.at(value);
      svg.append(element("line", { class: "grid", x1: at, x2: at, y1: box.top, y2: box.bottom }));
      svg.append(element("text", { x: at, y: box.bottom + 17, "text-anchor": "middle" }, number(value)));
    }
    for (const value of ticks(up.low, up.high, 6)) {
      const at = up.at(value);
      svg.append(element("line", { class: "grid", x1: box.left, x2: box.right, y1: at, y2: at }));
      svg.append(element("text", { x: box.left - 6, y: at + 4, "text-anchor": "end" }, number(value)));
    }
    const middle = (box.top + box.bottom) / 2;
    svg.append(element("text", { x: (box.left + box.right) / 2, y: height - 8, "text-anchor": "middle" }, label(x)));
    svg.append(
      element("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, label(y)),
    );
    const front = (data.fronts[`${x}|${y}`] || []).map((index) => data.groups[index].spread);
    const path = front.map((spread) => `${across.at(spread[x][0])},${up.at(spread[y][0])}`);
    svg.append(element("polyline", { class: "front", points: path.join(" ") }));
    for (const group of data.groups) {
      const [a, b] = [group.spread[x], group.spread[y]];
      if (!a || !b) continue;
      const [cx, cy] = [across.at(a[0]), up.at(b[0])];
      const line = { stroke: colour(group), "stroke-width": 1.2 };
      svg.append(element("line", { ...line, x1: across.at(a[1]), x2: across.at(a[2]), y1: cy, y2: cy }));
      svg.append(element("line", { ...line, x1: cx, x2: cx, y1: up.at(b[1]), y2: up.at(b[2]) }));
      svg.append(element("circle", { cx, cy, r: 4.5, fill: colour(group) }));
    }
    for (const run of runs) {
      const [cx, cy] = [across.at(run.values[x]), up.at(run.values[y])];
      const group = data.groups[run.group];
      const ring = { class: "run", cx, cy, r: 7, stroke: colour(group), tabindex: 0, role: "button" };
      const point = element("circle", { ...ring, "aria-label": run.name });
      point.append(element("title", {}, `${run.name}: ${number(run.values[x])}, ${number(run.values[y])}`));
      for (const event of ["pointerenter", "focus", "click"]) point.addEventListener(event, () => show(run));
      svg.append(point);
    }
  }

  for (const [name, preset] of [["x", 0], ["y", data.axes.findIndex((axis) => axis.key === data.score)]]) {
    for (const axis of data.axes) choices[name].append(new Option(axis.label, axis.key));
    choices[name].selectedIndex = preset;
    choices[name].addEventListener("change", draw);
  }
  if (methods.length > 1)
    for (const method of methods) {
      const entry = document.createElement("span");
      entry.textContent = `● ${method} `;
      entry.style.color = colour({ method });
      document.getElementById("legend").append(entry);
    }
  document.getElementById("explorer").hidden = false;
  addEventListener("resize", draw);
  draw();
})();
