// Tables: headings sort, a field filters, and a row can be marked from a chart.

function sortable(table) {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column], said = cell.dataset.order ?? cell.textContent;
    if (said === "") return null;
    return headings[column].classList.contains("number") ? Number(said) : said.toLowerCase();
  };
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", {numeric: true}) : a - b;
  headings.forEach((heading, column) => {
    const button = element("button", {type: "button"}, ...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => [key(row, column), row]);
      // What is missing stays at the end, whichever way.
      rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * compare(a, b));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

function filtered(box) {
  const field = box.querySelector("input[type=search]"), count = box.querySelector("output");
  if (!field) return;
  const rows = [...box.querySelector("tbody").rows];
  field.closest("p").hidden = false;
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      left += !row.hidden;
    }
    count.textContent = left === rows.length ? `${left} rows` : `${left} of ${rows.length} rows`;
  });
}

for (const box of document.querySelectorAll("div.table")) {
  sortable(box.querySelector("table"));
  filtered(box);
}

document.addEventListener("row", ({detail}) => {
  for (const old of document.querySelectorAll("tr.chosen")) old.classList.remove("chosen");
  const row = document.getElementById(detail.row);
  if (!row) return;
  row.hidden = false;
  row.classList.add("chosen");
  if (detail.from) row.scrollIntoView({block: "center", behavior: "smooth"});
});

document.addEventListener("click", event => {
  const row = event.target.closest?.("tbody tr");
  if (row?.id && !event.target.closest("a"))
    document.dispatchEvent(new CustomEvent("row", {detail: {row: row.id}}));
});
