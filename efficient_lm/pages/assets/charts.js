// Charts: a figure holds its data; what is shown of it is drawn again whenever that or its width changes.

const MANY = 60;       // series from which on lines are thin
const REACH = 110;     // pixels from the pointer within which a point is found

class Chart {
  constructor(figure) {
    this.spec = JSON.parse(figure.querySelector("script").textContent);
    this.figure = figure;
    this.groups = new Map(this.spec.groups.map(group => [group.name, group]));
    this.hidden = new Set();
    this.settle = this.spec.settle;
    this.x = this.spec.across[0];
    this.y = this.spec.up[0];
    this.log = {x: this.x.log, y: this.y.log};
    this.width = 0;
    this.plot = element("div", {class: "plot", tabindex: "0", role: "group",
      "aria-label": `${this.spec.title}. Arrow keys go from point to point.`});
    this.tip = element("div", {class: "tip", role: "status", hidden: ""});
    this.legend = element("div", {class: "legend"});
    figure.prepend(this.controls(), this.plot, this.legend);
    this.drawLegend();
    this.listen();
    new ResizeObserver(() => {
      if (Math.round(this.plot.clientWidth) !== this.width) this.draw();
    }).observe(this.plot);
  }

  controls() {
    const bar = element("div", {class: "controls"});
    const choose = (key, said, measures) => {
      if (measures.length < 2) return;
      const select = element("select");
      measures.forEach((measure, place) => select.add(new Option(measure.label, place)));
      select.addEventListener("change", () => {
        this[key] = measures[select.value];
        this.log[key] = boxes[key].checked = this[key].log;
        this.draw();
      });
      bar.append(element("label", {}, said, " ", select));
    };
    const boxes = {};
    const tick = (said, checked, change) => {
      const box = element("input", {type: "checkbox"});
      box.checked = checked;
      box.addEventListener("change", () => { change(box.checked); this.draw(); });
      bar.append(element("label", {}, box, " ", said));
      return box;
    };
    choose("y", "Show", this.spec.up);
    choose("x", "against", this.spec.across);
    boxes.x = tick("log x", this.log.x, on => { this.log.x = on; });
    boxes.y = tick("log y", this.log.y, on => { this.log.y = on; });
    if (this.spec.settle) tick("first steps too", false, on => { this.settle = !on; });
    return bar;
  }

  // Of every series that is shown, its points where both measures are known.
  shown() {
    const found = [];
    for (const series of this.spec.series) {
      const {[this.x.name]: across, [this.y.name]: up} = series.columns;
      if (!across || !up || this.hidden.has(series.group)) continue;
      const low = series.columns[this.y.name + ":low"], high = series.columns[this.y.name + ":high"];
      const points = [];
      for (let place = 0; place < up.length; place++) {
        const x = across[place], y = up[place];
        if (x === null || y === null || (this.log.x && x <= 0) || (this.log.y && y <= 0)) continue;
        const ranged = low && low[place] !== null && high[place] !== null && (!this.log.y || low[place] > 0);
        points.push({x, y, place, series, low: ranged ? low[place] : y, high: ranged ? high[place] : y});
      }
      if (points.length) found.push({series, points});
    }
    return found;
  }

  extent(shown) {
    let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const {series, points} of shown) {
      // Of a curve that falls, what is above is only its first tenth.
      const first = this.settle && series.line ? 0.9 * points[0].x + 0.1 * points.at(-1).x : -Infinity;
      for (const point of points) {
        left = Math.min(left, point.x);
        right = Math.max(right, point.x);
        low = Math.min(low, point.low);
        if (point.x >= first) high = Math.max(high, point.high);
      }
    }
    const limit = this.spec.limits[this.x.name];
    return limit ? [Math.min(left, limit), Math.max(right, limit), low, high] : [left, right, low, high];
  }

  draw() {
    this.width = Math.round(this.plot.clientWidth);
    if (!this.width) return;
    const height = Math.round(Math.max(300, Math.min(460, this.width * 0.55)));
    const svg = shape(null, "svg", {width: this.width, height, role: "img", "aria-label": this.spec.title});
    this.plot.replaceChildren(svg, this.tip);
    svg.classList.toggle("many", this.spec.series.length > MANY);
    this.lit = null;
    this.tip.hidden = true;
    const shown = this.shown();
    this.lines = shown;
    if (!shown.length) {
      shape(svg, "text", {x: this.width / 2, y: height / 2, "text-anchor": "middle"}, "nothing to show here");
      return;
    }
    const [left, right, low, high] = this.extent(shown);
    const area = {left: 58, right: this.width - 12, top: 34, bottom: height - 52};
    this.across = axis(left, right, area.left, area.right, this.log.x, Math.max(3, Math.floor(this.width / 110)));
    this.up = axis(low, high, area.bottom, area.top, this.log.y, 6);
    this.drawAxes(svg, area, height);
    const id = this.figure.id + "-clip";
    const clip = shape(shape(svg, "defs", {}), "clipPath", {id});
    shape(clip, "rect", {x: area.left, y: area.top - 6, width: area.right - area.left, height: area.bottom - area.top + 12});
    this.layer = shape(svg, "g", {"clip-path": `url(#${id})`});
    for (const line of shown) this.drawSeries(line);
    if (this.spec.front) this.drawFront(shown);
    this.over = shape(svg, "g", {});
  }

  drawAxes(svg, area, height) {
    const {left, right, top, bottom} = area;
    for (const tick of this.across.ticks) {
      const x = this.across.at(tick);
      shape(svg, "line", {class: "grid", x1: x, x2: x, y1: top, y2: bottom});
      shape(svg, "text", {x: Math.min(x, right - 14), y: bottom + 20, "text-anchor": "middle"}, figure(tick));
    }
    for (const tick of this.up.ticks) {
      const y = this.up.at(tick);
      shape(svg, "line", {class: "grid", x1: left, x2: right, y1: y, y2: y});
      shape(svg, "text", {x: left - 8, y: y + 5, "text-anchor": "end"}, figure(tick));
    }
    shape(svg, "text", {class: "title", x: (left + right) / 2, y: height - 8, "text-anchor": "middle"}, this.x.label);
    shape(svg, "text", {class: "title", x: 4, y: 17}, this.y.label);
    const limit = this.spec.limits[this.x.name];
    if (limit) {
      const x = this.across.at(limit);
      shape(svg, "line", {class: "limit", x1: x, x2: x, y1: top, y2: bottom});
      shape(svg, "text", {class: "limit", x: x - 6, y: top + 14, "text-anchor": "end"}, this.spec.limit);
    }
  }

  drawSeries({series, points}) {
    const group = this.groups.get(series.group);
    const layer = shape(this.layer, "g", {class: `series ${colored(group)}`});
    layer.dataset.group = series.group;
    for (const point of points) {
      point.left = this.across.at(point.x);
      point.top = this.up.at(point.y);
      point.layer = layer;
    }
    const path = places => places.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join("L");
    if (points.some(point => point.low < point.high)) {
      const ends = points.map(point => [point.left, this.up.at(point.low), this.up.at(point.high)]);
      if (series.line) {
        const around = [...ends.map(([x, low]) => [x, low]), ...ends.reverse().map(([x, , high]) => [x, high])];
        shape(layer, "path", {class: "band", d: `M${path(around)}Z`});
      } else {
        for (const [x, low, high] of ends) shape(layer, "path", {class: "range", d: `M${x - 4},${low}h8m-4,0V${high}m-4,0h8`});
      }
    }
    if (series.line) {
      const d = "M" + path(points.map(point => [point.left, point.top]));
      shape(layer, "path", {class: series.strong ? "line strong" : "line", d, "stroke-dasharray": DASHES[group.dash]});
    }
    if (series.marks || points.length === 1) {
      for (const point of points) shape(layer, "path", {class: "mark", d: mark(group.mark, point.left, point.top, 5)});
    }
  }

  drawFront(shown) {
    const best = front(shown.flatMap(line => line.points), this.y.more);
    const [start, ...rest] = best;
    const stairs = rest.map(point => `H${point.left.toFixed(1)}V${point.top.toFixed(1)}`).join("");
    const line = shape(null, "path", {class: "front", d: `M${start.left.toFixed(1)},${start.top.toFixed(1)}${stairs}`});
    this.layer.prepend(line);
    for (const point of best) shape(this.layer, "circle", {class: "front", cx: point.left, cy: point.top, r: 9});
  }

  drawLegend() {
    const used = name => this.spec.series.filter(series => series.group === name);
    const buttons = this.spec.groups.map(group => {
      const of = used(group.name);
      const button = element("button", {type: "button", "aria-pressed": "true"},
        swatch(group, of.some(series => series.line), of.some(series => series.marks)), element("span", {}, group.name));
      button.addEventListener("click", () => this.toggle(group.name, button));
      for (const [event, lit] of [["pointerenter", true], ["pointerleave", false], ["focus", true], ["blur", false]])
        button.addEventListener(event, () => this.light(lit ? layer => layer.dataset.group === group.name : null));
      return button;
    });
    if (buttons.length > 5) {
      const every = (said, hide) => {
        const button = element("button", {type: "button", class: "every"}, said);
        button.addEventListener("click", () => {
          this.hidden = new Set(hide ? this.groups.keys() : []);
          for (const each of buttons) each.setAttribute("aria-pressed", String(!hide));
          this.draw();
        });
        return button;
      };
      this.legend.append(every("all", false), every("none", true));
    }
    this.legend.append(...buttons);
    if (this.spec.front) {
      const line = shape(null, "svg", {width: 30, height: 14, "aria-hidden": "true"});
      shape(line, "path", {class: "front", d: "M1,4H15V10H29"});
      this.legend.append(element("span", {class: "key"}, line, this.spec.front));
    }
  }

  toggle(group, button) {
    if (!this.hidden.delete(group)) this.hidden.add(group);
    button.setAttribute("aria-pressed", String(!this.hidden.has(group)));
    this.draw();
    this.light(this.hidden.has(group) ? null : layer => layer.dataset.group === group);
  }

  // Let the series that a test holds for stand out, or with none all alike.
  light(test) {
    const layers = [...this.plot.querySelectorAll("g.series")];
    const found = test ? layers.filter(test) : [];
    for (const layer of layers) layer.classList.toggle("dim", found.length > 0 && !found.includes(layer));
  }

  listen() {
    const near = event => {
      const frame = this.plot.getBoundingClientRect();
      this.show(this.nearest(event.clientX - frame.left, event.clientY - frame.top));
    };
    this.plot.addEventListener("pointermove", near);
    this.plot.addEventListener("pointerdown", near);
    this.plot.addEventListener("pointerleave", () => this.show(null));
    this.plot.addEventListener("blur", () => this.show(null));
    this.plot.addEventListener("click", () => this.choose());
    this.plot.addEventListener("keydown", event => this.step(event));
    document.addEventListener("row", event => this.ring(event.detail));
  }

  nearest(left, top) {
    let [found, least] = [null, REACH ** 2];
    for (const {points} of this.lines) for (const point of points) {
      const away = (point.left - left) ** 2 + (point.top - top) ** 2;
      if (away < least) [found, least] = [point, away];
    }
    return found;
  }

  show(point) {
    if (this.lit === point || !this.over) return;
    this.lit = point;
    this.over.replaceChildren();
    this.tip.hidden = !point;
    this.light(point && point.series.line && this.lines.length > 1 ? layer => layer === point.layer : null);
    if (!point) return;
    shape(this.over, "circle", {class: "at", cx: point.left, cy: point.top, r: 6});
    const {series, place} = point, name = series.labels?.[place] ?? series.name;
    const range = point.low < point.high ? ` (${figure(point.low)} to ${figure(point.high)})` : "";
    this.tip.replaceChildren(element("b", {}, name), ...(series.group === name ? [] : [element("i", {}, series.group)]),
      element("span", {}, `${this.y.label}: ${figure(point.y)}${range}`),
      element("span", {}, `${this.x.label}: ${figure(point.x)}`));
    const side = point.left > this.width / 2 ? -this.tip.offsetWidth - 14 : 14;
    this.tip.style.left = Math.max(0, Math.min(point.left + side, this.width - this.tip.offsetWidth)) + "px";
    this.tip.style.top = Math.max(0, point.top - this.tip.offsetHeight - 10) + "px";
  }

  step(event) {
    if (!this.lines?.length) return;
    if (event.key === "Enter") return this.choose();
    if (event.key === "Escape") return this.show(null);
    const moves = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0]};
    if (!moves[event.key]) return;
    event.preventDefault();
    const [other, along] = moves[event.key];
    const line = this.lines.findIndex(line => this.lit && line.series === this.lit.series);
    if (line < 0) return this.show(this.lines[0].points[0]);
    const points = this.lines[(line + other + this.lines.length) % this.lines.length].points;
    const here = this.lines[line].points.indexOf(this.lit);
    const nearest = () => points.reduce((a, b) => Math.abs(b.left - this.lit.left) < Math.abs(a.left - this.lit.left) ? b : a);
    // Of points that stand alone the next series is what one sees as the next point.
    if (along && points.length === 1) return this.show(this.lines[(line + along + this.lines.length) % this.lines.length].points[0]);
    this.show(other ? nearest() : points[Math.max(0, Math.min(points.length - 1, here + along))]);
  }

  choose() {
    const row = this.lit?.series.rows?.[this.lit.place] ?? this.lit?.series.rows?.[0];
    if (row) document.dispatchEvent(new CustomEvent("row", {detail: {row, from: this.figure}}));
  }

  ring({row}) {
    if (!this.over) return;
    this.over.querySelectorAll(".chosen").forEach(old => old.remove());
    for (const {series, points} of this.lines) for (const point of points) {
      if (series.rows?.[point.place] === row && series.marks)
        shape(this.over, "circle", {class: "chosen", cx: point.left, cy: point.top, r: 11});
    }
  }
}

for (const figure of document.querySelectorAll("figure.chart")) new Chart(figure).draw();
