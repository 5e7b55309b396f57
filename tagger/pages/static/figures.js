/** What a dataset page shows of a range of days: its charts and the tables beside them. */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const { h, icon, prose, panel, table, shortened } = tagging.dom;
  const { count, short, usd, shortUsd, rate, percent, points, atLeast, known } = tagging.format;
  const { RECENT, BEFORE, sum, knownSum, lastTags, speed, kinds, movers, changes, text } = tagging.days;
  const { ChartPanel } = tagging.charts;

  const SAVED = [
    ["saved_usd", "Saved by the cache", "--cached"],
    ["saved_by_duplicates_usd", "Saved by duplicates", "--pending"],
    ["saved_by_batch_usd", "Saved by the Batch API", "--refused"],
    ["saved_by_prompt_caching_usd", "Saved by prompt caching", "--skipped"],
  ];
  const OUTCOMES = ["tagged", "cached", "refused", "failed", "skipped", "pending"];
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];
  const LINES = 8;
  const chosenTags = new Map();

  const capital = (word) => word[0].toUpperCase() + word.slice(1);
  const bySum = (bins, name) => bins.map(({ days }) => sum(days, name));

  /** "Most was $2.10 (2026-10-02)." */
  function most(bins, values, format) {
    const best = values.reduce((at, value, index) => (known(value) && !(values[at] >= value) ? index : at), -1);
    return best < 0 || bins.length < 2 ? "" : ` The most was ${format(values[best])}: ${bins[best].label}.`;
  }

  function cost(view) {
    const { bins, unit, days } = view;
    const spent = bySum(bins, "spent_usd");
    const saved = SAVED.map(([name, title, color]) => ({ name: title, color, values: bySum(bins, name) }));
    const total = atLeast(knownSum(days, ...SAVED.map(([name]) => name)), usd);
    return new ChartPanel({
      ...view,
      name: "cost",
      title: `Cost per ${unit}`,
      stacked: true,
      format: usd,
      axis: shortUsd,
      about: "What was spent, and on top of it what was saved against asking for each row at once.",
      summary: `Spent ${atLeast(knownSum(days, "spent_usd"), usd)}, saved ${total}.${most(bins, spent, usd)}`,
      series: [{ name: "Spent", color: "--tagged", values: spent }, ...saved],
    });
  }

  function outcomes(view) {
    const { bins, unit, days } = view;
    const told = OUTCOMES.map((name) => `${count(sum(days, name))} ${name}`).join(", ");
    return new ChartPanel({
      ...view,
      name: "outcomes",
      title: `Texts per ${unit}`,
      stacked: true,
      format: count,
      axis: short,
      about: "The distinct texts of each run by what became of them; one that waits counts in each run.",
      summary: `${count(sum(days, "texts"))} texts: ${told}.`,
      series: OUTCOMES.map((name) => ({ name: capital(name), color: `--${name}`, values: bySum(bins, name) })),
    });
  }

  function throughput(view) {
    const values = view.bins.map(({ days }) => speed(days));
    return new ChartPanel({
      ...view,
      name: "speed",
      title: "Throughput",
      format: (value) => `${rate(value)} texts/s`,
      axis: rate,
      about: "New texts per second while the tag step ran; broken lines pass over days without one.",
      summary: `${rate(speed(view.days))} texts per second on the whole.${most(view.bins, values, rate)}`,
      empty: "No text was asked in these days.",
      series: [{ name: "Texts per second", kind: "line", color: "--tagged", values }],
    });
  }

  function estimate(view) {
    const { bins, days } = view;
    const [estimated, actual] = ["estimated_usd", "estimated_actual_usd"].map((name) => bySum(bins, name));
    const off = estimated.map((value, bin) => (known(value) && actual[bin] ? value / actual[bin] - 1 : null));
    const told = (share) => `${share < 0 ? "−" : "+"}${percent(Math.abs(share))}`;
    return new ChartPanel({
      ...view,
      name: "estimate",
      title: "Estimate against actual cost",
      format: usd,
      axis: shortUsd,
      about: "What the plans expected their runs to cost, and what those runs did cost.",
      summary: `Estimated ${atLeast(knownSum(days, "estimated_usd"), usd)}, spent ${atLeast(knownSum(days, "estimated_actual_usd"), usd)}.`,
      empty: "No run of these days has an estimate: the price of the model is not known, or no text was new.",
      series: [
        { name: "Actual", color: "--tagged", values: actual },
        { name: "Estimated", kind: "mark", color: "--text", values: estimated },
      ],
      more: [{ name: "Estimate off by", values: off, format: told }],
    });
  }

  /** All tags by their last count; those that were not counted in the range, last. */
  function ranked(view, tags) {
    const counts = lastTags(view.days) ?? {};
    const found = new Set([...tags, ...view.days.flatMap((day) => Object.keys(day.tags ?? {}))]);
    return [...found].sort((a, b) => (counts[b] ?? -1) - (counts[a] ?? -1));
  }

  /** Lines of the chosen tags; each keeps its colour while it is chosen. */
  function lines(view, slots) {
    const counted = view.bins.map(({ days }) => lastTags(days));
    return slots.flatMap((tag, slot) =>
      tag === null
        ? []
        : [
            {
              name: tag,
              kind: "line",
              color: `--line-${(slot % LINES) + 1}`,
              dash: DASHES[(Math.floor(slot / LINES) + (slot % LINES > 3 ? 1 : 0)) % DASHES.length],
              values: counted.map((counts) => (counts ? (counts[tag] ?? 0) : null)),
            },
          ],
    );
  }

  function tags(view, page) {
    const all = ranked(view, page.tags);
    const key = page.card.dag_id;
    if (!chosenTags.has(key)) chosenTags.set(key, all.slice(0, LINES));
    const slots = chosenTags.get(key).map((tag) => (all.includes(tag) ? tag : null));
    const summary = () => {
      const last = lastTags(view.days);
      return `Rows by tag at the end: ${slots
        .filter(Boolean)
        .map((tag) => `${tag} ${last ? count(last[tag] ?? 0) : "unknown"}`)
        .join(", ")}.`;
    };
    const show = () => {
      chosenTags.set(key, slots);
      chart.change(lines(view, slots), summary());
    };
    const chooser = choices(all, slots, show);
    const chart = new ChartPanel(
      {
        ...view,
        name: "tags",
        title: "Tags over time",
        format: count,
        axis: short,
        fromZero: false,
        series: lines(view, slots),
        summary: summary(),
        about: `Rows of the target table that have each tag, at the end of each ${view.unit}.`,
        empty: all.length && !slots.some(Boolean) ? "No tag is chosen." : "No tags were counted in these days.",
      },
      chooser,
    );
    return chart;
  }

  /** Check boxes to choose the tags that are drawn. `slots` is changed in place. */
  function choices(all, slots, show) {
    const title = h("summary");
    const told = () => title.replaceChildren(`Choose tags (${slots.filter(Boolean).length} of ${all.length} drawn)`);
    const boxes = all.map((tag) => {
      const box = h("input", {
        type: "checkbox",
        value: tag,
        onchange: () => {
          if (box.checked) slots[slots.includes(null) ? slots.indexOf(null) : slots.length] = tag;
          else slots[slots.indexOf(tag)] = null;
          told();
          show();
        },
      });
      box.checked = slots.includes(tag);
      return h("label.choice", null, box, h("span", null, tag));
    });
    const search = h("input", {
      type: "search",
      placeholder: "Find a tag",
      "aria-label": "Find a tag",
      oninput: () => {
        const words = search.value.normalize("NFKC").toLowerCase();
        boxes.forEach((label, index) => {
          label.hidden = !all[index].normalize("NFKC").toLowerCase().includes(words);
        });
      },
    });
    told();
    return h("details.choose", null, title, all.length > 12 && search, h("div.choices", null, boxes));
  }

  function change(value, most) {
    const word = Math.abs(value) < 0.00005 ? "same" : value > 0 ? "up" : "down";
    const told = word === "same" ? "same" : `${word} ${points(value)}`;
    return h(
      `span.change.${word}`,
      null,
      word !== "same" && icon(word),
      told,
      h("span.tilt", { "aria-hidden": "true" }, h("span", { "--share": most ? Math.abs(value) / most : 0 })),
    );
  }

  function moved(days, to) {
    const found = movers(days, to);
    const [start, end, before, until] = [to - RECENT + 1, to, to - RECENT - BEFORE + 1, to - RECENT].map(text);
    const about = `Mean share of all tags given, ${start} to ${end}, against the four weeks before, ${before} to ${until}.`;
    if (!found) {
      return panel("Tags that moved most", about, h("p.empty", null, "To compare, both need a day with counted tags."));
    }
    const columns = [
      { name: "Tag" },
      { name: "Before", number: true },
      { name: "Now", number: true },
      { name: "Change" },
    ];
    const largest = Math.abs(found[0]?.change ?? 0);
    const row = (each) => [
      h("span.clamp", { title: each.tag }, each.tag),
      { text: percent(each.before), value: each.before },
      { text: percent(each.now), value: each.now },
      { text: change(each.change, largest), value: each.change },
    ];
    const element = panel(
      "Tags that moved most",
      about,
      shortened(found, 8, (some) => table("Tags that moved most", columns, some.map(row), "moved"), "tags"),
    );
    element.dataset.table = "movers";
    return element;
  }

  function failures(days) {
    const found = kinds(days);
    const total = found.reduce((all, [, number]) => all + number, 0);
    const columns = [{ name: "Kind" }, { name: "Texts", number: true }, { name: "Share", number: true }];
    const row = ([kind, number]) => [
      h("code", null, kind),
      { text: count(number), value: number },
      h(
        "span.share",
        null,
        h("span.bar", { "aria-hidden": "true" }, h("span.failed", { "--share": number / found[0][1] })),
        percent(number / total),
      ),
    ];
    const content = found.length
      ? shortened(found, 8, (some) => table("Failures by kind", columns, some.map(row), "kinds"), "kinds")
      : h("p.empty", null, "No text failed or was refused in these days.");
    const element = panel("Failures by kind", "Texts that failed or were refused, by why.", content);
    element.dataset.table = "failures";
    return element;
  }

  function changed(found) {
    const item = ({ number, day, words }) =>
      h(
        "li",
        null,
        h("span.badge", null, number),
        h("span", null, h("time", { datetime: day }, day), " ", prose(words.join("; "))),
      );
    const content = found.length
      ? shortened(found, 6, (some) => h("ol.changes", null, some.map(item)), "changes")
      : h("p.empty", null, "Neither model nor spec changed in these days.");
    return panel("Model and spec changes", "The numbered lines in the charts.", content);
  }

  /**
   * Return the panels of a range, and the charts among them that are to be drawn once they stand in the page.
   * @param {object} page the dataset's page data; its days may begin before the range
   * @param {{from: number, to: number}} range
   */
  function panels(page, { from, to }) {
    const days = tagging.days.within(page.days, from, to);
    const cut = tagging.days.bins(days, from, to);
    const view = { ...cut, days, changes: changes(cut.bins) };
    const charts = [cost, outcomes, tags, throughput, estimate].map((make) => make(view, page));
    const [money, texts, lineChart, pace, expected] = charts.map(({ element }) => element);
    const elements = [
      money,
      texts,
      lineChart,
      moved(page.days, to),
      pace,
      expected,
      failures(days),
      changed(view.changes),
    ];
    return { elements, charts, unit: cut.unit };
  }

  tagging.figures = { panels, SAVED: SAVED.map(([name]) => name) };
})(globalThis.tagging);
