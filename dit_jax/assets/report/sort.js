// Searches and sorts the table of diffs. It only reads text and moves rows: nothing that a model wrote becomes markup.
"use strict";
for (const table of document.querySelectorAll(".sortable")) {
  const body = table.querySelector("tbody"), rows = Array.from(body.rows);
  const form = document.querySelector(".search"), count = form.querySelector("output");
  const texts = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
  const key = (row, at) => {
    const cell = row.cells[at];
    if (!cell) return -Infinity; // a diff that cannot be read has one long cell in place of the numbers
    return "sort" in cell.dataset ? (cell.dataset.sort === "" ? -Infinity : Number(cell.dataset.sort))
      : cell.textContent.trim().toLowerCase();
  };
  for (const [at, head] of Array.from(table.tHead.rows[0].cells).entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const sorted = rows.slice().sort((a, b) => {
        const x = key(a, at), y = key(b, at);
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
      });
      body.append(...sorted);
    });
  }
  form.addEventListener("input", () => {
    const words = form.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every(word => texts.get(row).includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} shown`;
  });
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
}
for (const link of document.querySelectorAll("a[href^='#diff-']")) {
  link.addEventListener("click", () => {
    const part = document.getElementById(link.hash.slice(1));
    if (part) part.querySelector("details").open = true;
  });
}
