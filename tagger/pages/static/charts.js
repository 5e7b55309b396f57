/** A chart with its legend and the table behind it; drawn by Chart.js 4.6.1 (chart.umd.min.js, MIT). */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const { h, panel, table } = tagging.dom;
  const { known, UNKNOWN, cut } = tagging.format;
  const { color } = tagging.theme;
  const drawn = new Map();

  /**
   * @typedef {object} Series
   * @property {string} name
   * @property {string} color a custom property of the style sheet
   * @property {(number|null)[]} values one a bin; null is not known, or nothing happened
   * @property {"bar"|"line"|"mark"} [kind] a bar unless told
   * @property {number[]} [dash] of a line
   *
   * @typedef {object} Spec
   * @property {string} name what `tagging.chart(name)` finds it by
   * @property {string} title
   * @property {string} about one line on what it shows
   * @property {string} summary what a listener hears instead of seeing it
   * @property {{label: string, tick: string, days: object[]}[]} bins
   * @property {"day"|"week"|"month"} unit
   * @property {Series[]} series
   * @property {{bin: number, number: number, words: string[]}[]} changes marked as vertical lines
   * @property {(value: number) => string} format of a value
   * @property {(value: number) => string} axis the same, short
   * @property {boolean} [stacked]
   * @property {boolean} [fromZero] whether the axis begins there; it does unless told
   * @property {string} [empty] what stands there where nothing is known
   * @property {{name: string, values: (number|null)[], format: Function}[]} [more] columns of the table alone
   */

  /** Draws a line, and its number above it, where model or spec changed. */
  const marks = (changes) => ({
    id: "marks",
    afterDatasetsDraw(chart) {
      const {
        ctx,
        chartArea: area,
        scales: { x },
      } = chart;
      let free = -Infinity;
      ctx.save();
      for (const { bin, number } of changes) {
        const at = Math.round(x.getPixelForValue(bin)) + 0.5;
        line(ctx, at, area);
        if (at < free) continue;
        badge(ctx, at, area.top - 9, number);
        free = at + 17;
      }
      ctx.restore();
    },
  });

  function line(ctx, at, area) {
    ctx.beginPath();
    ctx.setLineDash([3, 3]);
    ctx.lineWidth = 1;
    ctx.strokeStyle = color("--muted");
    ctx.moveTo(at, area.top - 2);
    ctx.lineTo(at, area.bottom);
    ctx.stroke();
  }

  function badge(ctx, at, middle, number) {
    ctx.beginPath();
    ctx.setLineDash([]);
    ctx.fillStyle = color("--text");
    ctx.arc(at, middle, 7.5, 0, 2 * Math.PI);
    ctx.fill();
    ctx.fillStyle = color("--panel");
    ctx.font = `600 ${number > 99 ? 8 : 10}px ${getComputedStyle(document.body).fontFamily}`;
    ctx.textAlign = "center";
    ctx.textBaseline = "middle";
    ctx.fillText(String(number), at, middle + 0.5);
  }

  const isolated = ({ dataset: { data }, dataIndex: i }) => !known(data[i - 1]) && !known(data[i + 1]);

  /** Return a series as Chart.js wants it. */
  function dataset(series, spec) {
    const shade = color(series.color);
    const base = {
      label: series.name,
      data: series.values,
      backgroundColor: shade,
      hoverBackgroundColor: shade,
      borderColor: shade,
    };
    const few = spec.bins.length <= 31;
    if (series.kind === "mark") {
      return {
        ...base,
        type: "line",
        showLine: false,
        pointStyle: "line",
        pointRadius: few ? 8 : 4,
        pointBorderWidth: 2,
        pointHoverRadius: 8,
        order: -1,
      };
    }
    if (series.kind !== "line")
      return { ...base, type: "bar", categoryPercentage: 0.86, barPercentage: 1, maxBarThickness: 36 };
    const gap = ({ p0DataIndex, p1DataIndex }) => (p1DataIndex - p0DataIndex > 1 ? [2, 4] : undefined);
    return {
      ...base,
      type: "line",
      borderWidth: 2,
      borderDash: series.dash ?? [],
      tension: 0,
      spanGaps: true,
      segment: { borderDash: gap },
      pointRadius: (context) => (few ? 2.5 : isolated(context) ? 3 : 0),
      pointHoverRadius: 4,
      pointBorderWidth: 0,
    };
  }

  function tooltip(spec) {
    const footer = (items) => {
      const { changes, format, stacked } = spec;
      const total = items.reduce((sum, { raw }) => sum + raw, 0);
      const marked = changes
        .filter(({ bin }) => bin === items[0]?.dataIndex)
        .flatMap(({ number, words }) => words.map((word) => cut(`${number}: ${word}`, 60)));
      const bin = items[0]?.dataIndex;
      const unknown = spec.series
        .filter(({ values }) => stacked && values[bin] === null)
        .map(({ name }) => `${name}: ${UNKNOWN}`);
      return [
        ...unknown,
        ...(stacked && items.length > 1 ? [`Total: ${unknown.length ? "at least " : ""}${format(total)}`] : []),
        ...marked,
      ];
    };
    return {
      backgroundColor: color("--panel"),
      borderColor: color("--control"),
      borderWidth: 1,
      titleColor: color("--text"),
      bodyColor: color("--text"),
      footerColor: color("--muted"),
      padding: 10,
      boxPadding: 2,
      boxWidth: 10,
      boxHeight: 10,
      multiKeyBackground: "transparent",
      footerFont: { weight: "normal" },
      filter: ({ raw }) => known(raw) && (!spec.stacked || raw !== 0),
      itemSort: spec.stacked ? undefined : (a, b) => b.raw - a.raw,
      callbacks: {
        labelColor: ({ dataset: { borderColor: shade } }) => ({
          backgroundColor: shade,
          borderColor: shade,
          borderWidth: 0,
        }),
        label: ({ dataset: { label }, raw }) => ` ${cut(label)}: ${spec.format(raw)}`,
        footer,
      },
    };
  }

  function options(spec) {
    const ticks = { color: color("--muted"), font: { size: 11 } };
    const marked = spec.changes.length > 0;
    return {
      animation: false,
      responsive: true,
      maintainAspectRatio: false,
      normalized: true,
      interaction: { mode: "index", intersect: false },
      layout: { padding: { top: marked ? 18 : 4, right: 2 } },
      plugins: { legend: { display: false }, tooltip: tooltip(spec) },
      scales: {
        x: {
          stacked: spec.stacked,
          grid: { display: false },
          border: { color: color("--line") },
          ticks: { ...ticks, maxRotation: 0, autoSkipPadding: 14, callback: (index) => spec.bins[index].tick },
        },
        y: {
          stacked: spec.stacked,
          beginAtZero: spec.fromZero !== false,
          border: { display: false },
          grid: { color: color("--line"), tickLength: 0 },
          ticks: { ...ticks, padding: 6, maxTicksLimit: 6, callback: (value) => spec.axis(value) },
        },
      },
    };
  }

  const UNITS = { day: "Day", week: "Week (Monday to Sunday)", month: "Month" };

  /** The figures of a chart: a row for each bin in which there was a run. */
  function behind(spec) {
    const given = [...spec.series, ...(spec.more ?? [])];
    const columns = [{ name: UNITS[spec.unit] }, ...given.map(({ name }) => ({ name, number: true }))];
    const cell = ({ values, format = spec.format }, bin) => ({
      text: known(values[bin]) ? format(values[bin]) : UNKNOWN,
      value: values[bin],
    });
    const rows = spec.bins.flatMap(({ label, days }, bin) =>
      days.length ? [[label, ...given.map((each) => cell(each, bin))]] : [],
    );
    return table(`${spec.title}. ${spec.about}`, columns, rows);
  }

  class ChartPanel {
    #spec;
    #legend = h("ul.legend");
    #place = h("div.plot");
    #details = h("details.behind", { ontoggle: () => this.#fill() }, h("summary", null, "Show as table"));

    /**
     * @param {Spec} spec
     * @param {...Node} controls between the chart and its table
     */
    constructor(spec, ...controls) {
      this.#spec = spec;
      this.element = panel(spec.title, spec.about, this.#legend, this.#place, ...controls, this.#details);
      this.element.dataset.chart = spec.name;
    }

    /** Draw the chart; its panel must stand in the page. */
    draw() {
      const { name, series, bins, changes, summary, empty } = this.#spec;
      this.#legend.replaceChildren(...series.map((each, index) => this.#entry(each, index)));
      drawn.get(name)?.chart.destroy();
      drawn.delete(name);
      if (!series.some(({ values }) => values.some(known))) {
        this.#place.replaceChildren(h("p.empty", null, empty ?? "Nothing to show in these days."));
        return;
      }
      Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
      const canvas = h("canvas", { role: "img", "aria-label": summary });
      this.#place.replaceChildren(canvas);
      const data = {
        labels: bins.map(({ label }) => label),
        datasets: series.map((each) => dataset(each, this.#spec)),
      };
      const chart = new Chart(canvas, { type: "bar", data, options: options(this.#spec), plugins: [marks(changes)] });
      drawn.set(name, { chart, panel: this });
    }

    /** Show other series, and tell so. */
    change(series, summary) {
      this.#spec = { ...this.#spec, series, summary };
      this.draw();
      this.#fill();
    }

    /** Take the colours of the present theme. */
    recolor(chart) {
      chart.options = options(this.#spec);
      this.#spec.series.forEach((each, index) => Object.assign(chart.data.datasets[index], dataset(each, this.#spec)));
      chart.update(); // in the mode "none" bars would keep their colours
    }

    #fill() {
      if (!this.#details.open) return;
      this.#details.querySelector(".scroll")?.remove();
      this.#details.append(behind(this.#spec));
    }

    #entry({ name, color: shade, kind = "bar", dash }, index) {
      const swatch = h(`span.swatch.${kind === "line" && dash?.length ? "dashed" : kind}`, {
        "--swatch": `var(${shade})`,
      });
      const button = h(
        "button",
        {
          type: "button",
          "aria-pressed": "true",
          title: name,
          onclick: () => {
            const shown = button.getAttribute("aria-pressed") !== "true";
            button.setAttribute("aria-pressed", String(shown));
            const chart = drawn.get(this.#spec.name)?.chart;
            chart?.setDatasetVisibility(index, shown);
            chart?.update("none");
          },
        },
        swatch,
        h("span.name", null, name),
      );
      return h("li", null, button);
    }
  }

  /** Forget the charts of the page that is left. */
  function clear() {
    for (const { chart } of drawn.values()) chart.destroy();
    drawn.clear();
  }

  tagging.theme.onChange(() => {
    for (const { chart, panel: owner } of drawn.values()) owner.recolor(chart);
  });

  tagging.charts = { ChartPanel, clear };
  /** Return the Chart.js object of a chart by its name, such as "cost"; undefined where it is not drawn. */
  tagging.chart = (name) => drawn.get(name)?.chart;
})(globalThis.tagging);
