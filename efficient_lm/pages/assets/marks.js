// Elements, and the shapes of marks and dashes; what they are called in palette.py.

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// The outline of a mark of radius r around a place.
function mark(kind, x, y, r) {
  const polygon = places => "M" + places.map(([dx, dy]) => `${(x + dx * r).toFixed(1)},${(y + dy * r).toFixed(1)}`).join("L") + "Z";
  switch (kind) {
    case 1: return polygon([[-0.88, -0.88], [0.88, -0.88], [0.88, 0.88], [-0.88, 0.88]]);
    case 2: return polygon([[0, -1.15], [1.1, 0.85], [-1.1, 0.85]]);
    case 3: return polygon([[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]]);
    case 4: return polygon([[0, 1.15], [1.1, -0.85], [-1.1, -0.85]]);
    case 5: return polygon([[-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4], [1.2, 0.4], [0.4, 0.4], [0.4, 1.2],
                            [-0.4, 1.2], [-0.4, 0.4], [-1.2, 0.4], [-1.2, -0.4], [-0.4, -0.4]]);
    default: return `M${(x - r).toFixed(1)},${y.toFixed(1)}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0`;
  }
}

function colored(group) {
  return group.color === null ? "grey" : "c" + group.color;
}

// What stands for a group in the legend.
function swatch(group, line, marks) {
  const picture = shape(null, "svg", {width: 30, height: 14, "aria-hidden": "true", class: colored(group)});
  if (line) shape(picture, "path", {d: "M1,7H29", class: "line strong", "stroke-dasharray": DASHES[group.dash]});
  if (marks) shape(picture, "path", {d: mark(group.mark, 15, 7, 4.5), class: "mark"});
  return picture;
}
