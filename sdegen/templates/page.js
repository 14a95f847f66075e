// Comfort only: the page says the same without it. Tables sort by a click on a head; a filter narrows the table of cells
// and lights the curves of the solvers that are left.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const cell = row.cells[i], text = cell ? cell.dataset.v ?? cell.textContent : "";
    return text.trim() === "" || Number.isNaN(Number(text)) ? text : Number(text);
  };
  const compare = (a, b) => {
    const missing = (x) => x === "nan" || x === "";
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  };
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => compare(value(a, i), value(b, i)));
      body.append(...(down ? rows.reverse() : rows));
    };
  });
}
const filter = document.getElementById("filter");
if (filter) {
  const rows = [...document.querySelectorAll("table.sortable tbody tr")];
  const curves = [...document.querySelectorAll("g.curve")].map((g) => [g, g.querySelector("title").textContent]);
  const fits = (row, word) => {
    const known = row.dataset.find.toLowerCase().split(" ");  // a number is meant whole, a name in part
    return known.some((one) => (Number.isNaN(Number(word)) ? one.includes(word) : one === word));
  };
  filter.querySelector("input").oninput = (event) => {
    const words = event.target.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => fits(row, word));
    const shown = rows.filter((row) => !row.hidden), names = new Set(shown.map((row) => row.dataset.solver));
    filter.querySelector("output").textContent = words.length ? `${shown.length} of ${rows.length} cells` : "";
    for (const [g, name] of curves) g.classList.toggle("lit", words.length > 0 && names.has(name));
  };
  for (const part of document.querySelectorAll("#filter, .scripted")) part.hidden = false;
}
