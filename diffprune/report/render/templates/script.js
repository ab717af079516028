"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows];
  const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent.trim();
  const compare = (a, b) => (Number.isNaN(a - b) || a === "" || b === "" ? String(a).localeCompare(b, "en", {numeric: true}) : a - b);
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down < 0 ? "descending" : "ascending");
      table.classList.add("sorted");
      const known = (row) => value(row, i) !== "–";
      body.append(...rows.slice().sort((a, b) => known(b) - known(a) || down * compare(value(a, i), value(b, i))));
    });
  });
  const label = document.createElement("label"), field = document.createElement("input");
  label.className = "filter";
  field.type = "search";
  const some = (rows[1] ?? rows[0]).cells;
  field.placeholder = `e.g. ${some[0].textContent.trim().split(" ")[0].toLowerCase()} ${some[1].textContent.trim()}`;
  label.append("Show only rows with ", field);
  table.closest(".table").prepend(label);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const told = [...row.cells].filter((cell, i) => i < 2 || cell.dataset.v === undefined);
      const text = told.map((cell) => cell.textContent.trim().toLowerCase()).join(" ");
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const one of opened) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of opened) one.open = false;
});
