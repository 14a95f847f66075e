// Comfort only: the page says the same without it. Tables sort by a click on a head; a filter narrows the table of cells
// and lights the curves of the solvers that are left.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const cell = row.cells[i], text = cell ? cell.textContent.trim() : "";
    if (cell && cell.dataset.v !== undefined) return Number(cell.dataset.v);
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  };
  const missing = (x) => x === "" || Number.isNaN(x);
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
      const known = [...body.rows].map((row) => [value(row, i), row]);
      known.sort(([a], [b]) => missing(a) - missing(b) || sign * compare(a, b));  // what is unknown stays at the end
      body.append(...known.map(([, row]) => row));
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
  filter.querySelector("input[type=search]").oninput = (event) => {
    const words = event.target.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => fits(row, word));
    const shown = rows.filter((row) => !row.hidden), names = new Set(shown.map((row) => row.dataset.solver));
    filter.querySelector("output").textContent = words.length ? `${shown.length} of ${rows.length} cells` : "";
    for (const [g, name] of curves) g.classList.toggle("lit", words.length > 0 && names.has(name));
  };
  const table = document.querySelector("table.sortable"), all = filter.querySelector("input[type=checkbox]");
  all.parentElement.hidden = !table.querySelector(".more");
  all.onchange = () => table.classList.toggle("few", !all.checked);
  all.onchange();
  for (const part of document.querySelectorAll("#filter, .scripted")) part.hidden = false;
}
