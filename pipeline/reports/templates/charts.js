// Draws the charts of a report. Each element `.chart` is followed by a script element with the chart's data as JSON.
"use strict";

const format = (number) => Number(number.toPrecision(6)).toLocaleString("en", { maximumSignificantDigits: 6 });

/** Turns compact series into the rows that the specification of a line chart names: lines, points and hover. */
function datasets(series, xTitle) {
  const lines = [];
  const points = [];
  const hover = new Map();
  for (const { label, mark, x, y } of series) {
    y.forEach((value, n) => {
      const row = { label, [xTitle]: x[n], value };
      if (mark === "line") lines.push(row);
      if (value === null) return;
      // A point between two gaps is too short for a line.
      const alone = (y[n - 1] ?? null) === null && (y[n + 1] ?? null) === null;
      if (mark === "points" || alone) points.push(row);
      if (!hover.has(x[n])) hover.set(x[n], { [xTitle]: x[n] });
      hover.get(x[n])[label] = format(value);
    });
  }
  return { lines, points, hover: [...hover.values()] };
}

/** Returns the style for an element. Colours are CSS variables, so charts follow the page into dark mode and print. */
function configFor(element, series) {
  const text = { labelColor: "var(--faint)", labelFontSize: 12 };
  const entryWidth = 36 + 7 * Math.max(...series.map(({ label }) => label.length)); // Pixels, estimated.
  return {
    background: null,
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: {
      ...text, labelFontSize: 11, titleColor: "var(--faint)", titleFontWeight: "normal", titleFontSize: 11,
      gridColor: "var(--line)", domainColor: "var(--line)", tickColor: "var(--line)",
    },
    axisX: { grid: false },
    axisY: { labelLimit: 0.35 * element.clientWidth },
    legend: {
      ...text, orient: "bottom", symbolStrokeWidth: 2.5, columnPadding: 14, labelLimit: element.clientWidth - 60,
      columns: Math.max(1, Math.floor(element.clientWidth / entryWidth)), // Vega does not wrap a legend itself.
    },
  };
}

for (const element of document.querySelectorAll(".chart")) {
  const { spec, series, x_title: xTitle, description } = JSON.parse(element.nextElementSibling.textContent);
  if (series.length > 0) spec.datasets = datasets(series, xTitle);
  const options = {
    actions: false,
    ast: true, // Interprets expressions: the page's security policy forbids compiling them.
    config: configFor(element, series),
    defaultStyle: false,
    logLevel: 1, // Errors only: an empty dataset would cause a warning.
    mode: "vega-lite",
    renderer: "svg",
    tooltip: { disableDefaultStyle: true },
  };
  vegaEmbed(element, { ...spec, description }, options).catch((error) => {
    element.textContent = `${description} (The chart could not be drawn: ${error.message}.)`;
  });
}
