// Sorting by a column and filtering of rows; the page says everything without it.
"use strict";

function valueOf(cell) {
  if (cell === undefined) return null;
  const number = Number(cell.dataset.value ?? cell.textContent);
  return Number.isNaN(number) ? cell.textContent.trim() : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1; // figures before "-" and "skipped"
  if (typeof b === "number") return 1;
  return String(a).localeCompare(String(b));
}

function sortBy(table, heading) {
  const descending = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const column = Number(heading.dataset.column);
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => compare(valueOf(a.cells[column]), valueOf(b.cells[column])) * (descending ? -1 : 1));
  table.tBodies[0].append(...rows);
}

function makeSortable(table) {
  const [first, second] = table.tHead.rows;
  let column = 0;
  let inner = 0;
  for (const heading of first.cells) {
    const wide = second !== undefined && heading.colSpan > 1;
    for (const cell of wide ? [...second.cells].slice(inner, (inner += 2)) : [heading]) {
      cell.dataset.column = column++;
      cell.title = "sort";
      cell.addEventListener("click", () => sortBy(table, cell));
    }
  }
  table.dataset.sortable = "";
}

function makeFilter(section, tables) {
  const bar = document.createElement("div");
  bar.className = "filter";
  const search = Object.assign(document.createElement("input"), { type: "search", placeholder: "filter rows: op, shape, dtype" });
  search.setAttribute("aria-label", "filter rows");
  const lost = Object.assign(document.createElement("input"), { type: "checkbox" });
  const label = document.createElement("label");
  label.append(lost, " losses and failed rows only");
  bar.append(search, label);
  section.querySelector("h2").after(bar);
  const apply = () => {
    const words = search.value.toLowerCase().replaceAll("x", "×").split(/\s+/).filter(Boolean);
    for (const row of tables.flatMap((table) => [...table.tBodies[0].rows])) {
      const text = row.querySelector(".work").textContent.toLowerCase().replaceAll("x", "×");
      const wanted = words.every((word) => text.includes(word));
      row.hidden = !wanted || (lost.checked && !row.matches(".lost, .failed"));
    }
    for (const table of tables) {
      table.closest(".scroll").hidden = [...table.tBodies[0].rows].every((row) => row.hidden);
    }
  };
  for (const input of [search, lost]) input.addEventListener("input", apply);
}

const tables = [...document.querySelectorAll("table.rows")];
if (tables.length > 0) {
  tables.forEach(makeSortable);
  makeFilter(document.getElementById("rows"), tables);
}
