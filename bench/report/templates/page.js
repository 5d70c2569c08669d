"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      // The first click on a column of numbers puts the largest on top, on one of names the first of the alphabet.
      const sign = { descending: 1, ascending: -1 }[head.getAttribute("aria-sort")];
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => !row.classList.contains("over"));
        const number = (row) => (row.cells[column].dataset.order ? Number(row.cells[column].dataset.order) : NaN);
        const numeric = rows.some((row) => !Number.isNaN(number(row)));
        const direction = sign || (numeric ? -1 : 1);
        rows.sort((one, other) => {
          if (!numeric) return direction * one.cells[column].textContent.localeCompare(other.cells[column].textContent);
          const [a, b] = [number(one), number(other)];
          if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
          return direction * (a - b);
        });
        body.append(...rows);
        head.dataset.direction = direction;
      }
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", head.dataset.direction === "1" ? "ascending" : "descending");
    });
  });
}
for (const label of document.querySelectorAll("label.filter")) {
  label.hidden = false;
  const rows = label.nextElementSibling.querySelectorAll("tbody tr");
  label.querySelector("input").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
}
// What is folded is printed too.
addEventListener("beforeprint", () => document.querySelectorAll("details.panel").forEach((one) => (one.open = true)));
