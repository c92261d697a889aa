// Sorts tables, and searches those below a search form. It only reads text and moves rows: nothing that a model wrote
// becomes markup.
"use strict";
for (const table of document.querySelectorAll(".sortable")) {
  const body = table.querySelector("tbody"), rows = Array.from(body.rows);
  // Rows stay under the heading of their group.
  const groups = [[]];
  for (const row of rows) {
    if (row.classList.contains("group")) groups.push([row], []);
    else groups[groups.length - 1].push(row);
  }
  const text = (row, at) => row.cells[at] ? row.cells[at].textContent.trim() : "";
  const number = words => parseFloat(words.replace("−", "-"));
  const key = (row, at, numbers) => {
    const cell = row.cells[at];
    // A diff that cannot be read has one long cell in place of the numbers.
    if (!cell) return numbers ? -Infinity : "";
    if ("sort" in cell.dataset) return cell.dataset.sort === "" ? -Infinity : Number(cell.dataset.sort);
    const words = text(row, at);
    return !numbers ? words.toLowerCase() : Number.isNaN(number(words)) ? -Infinity : number(words);
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
      const words = groups.flatMap(part => part.map(row => text(row, at))).filter(word => /[^–]/.test(word));
      const numbers = at > 0 && words.some(word => !Number.isNaN(number(word)));
      for (const part of groups) {
        body.append(...part.sort((a, b) => {
          const x = key(a, at, numbers), y = key(b, at, numbers);
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        }));
      }
      table.dispatchEvent(new Event("sorted"));
    });
  }
  if (!table.classList.contains("diffs")) continue;
  const form = document.querySelector(".search"), count = form.querySelector("output");
  const texts = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
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
