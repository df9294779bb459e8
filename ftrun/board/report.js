// Draws the figures of report.html in the colours of the page, and sorts its table.
const figures = JSON.parse(document.getElementById("figures").textContent);
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function draw() {
  const ink = style("--ink"), quiet = style("--quiet"), line = style("--line");
  figures.forEach((given, index) => {
    const figure = JSON.parse(JSON.stringify(given)), layout = figure.layout;
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: {color: ink, family: "system-ui, sans-serif", size: 12},
      hoverlabel: {align: "left", namelength: -1},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: line, activecolor: quiet},
    });
    for (const name of new Set(["xaxis", "yaxis", ...Object.keys(layout).filter(key => /^[xy]axis/.test(key))]))
      layout[name] = Object.assign({gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true}, layout[name]);
    for (const trace of figure.data)
      if (trace.type == "parcoords")
        Object.assign(trace, {labelfont: {color: ink, size: 12}, tickfont: {color: quiet, size: 11},
                              rangefont: {color: "rgba(0,0,0,0)", size: 1}});
    Plotly.react(`figure-${index}`, figure.data, layout, {responsive: true, displaylogo: false});
  });
}
if (window.Plotly) {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
for (const heading of document.querySelectorAll("th")) {
  const sort = () => {
    const table = heading.closest("table"), body = table.tBodies[0], column = heading.cellIndex;
    const up = heading.getAttribute("aria-sort") != "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...body.rows].map((row, place) => [value(row), place, row]);
    rows.sort(([a, i], [b, j]) => {
      if (a === "" || b === "") return (a === "") - (b === "") || i - j;  // what is not known comes last
      const both = Number(a) - Number(b);
      return (up ? 1 : -1) * (Number.isNaN(both) ? a.localeCompare(b) : both) || i - j;
    });
    body.append(...rows.map(([, , row]) => row));
  };
  heading.addEventListener("click", sort);
  heading.addEventListener("keydown", event => { if (event.key == "Enter") sort(); });
}
