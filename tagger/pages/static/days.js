/** Arithmetic on the days of a dataset: ranges, bins, sums, what moved. It knows nothing of the page. */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const DAY = 86_400_000;
  const MOST_DAYS = 120; // a chart of more days than this is by week,
  const MOST_WEEK_DAYS = 731; // and beyond two years by month
  const RECENT = 7;
  const BEFORE = 28;
  const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

  const text = (day) => new Date(day * DAY).toISOString().slice(0, 10);

  /** Return a day, "2026-11-30", as days since 1970; null where it is none between 2000 and 2099. */
  function parse(value) {
    if (!/^20\d\d-\d\d-\d\d$/.test(value ?? "")) return null;
    const day = Date.parse(`${value}T00:00:00Z`) / DAY;
    return Number.isNaN(day) || text(day) !== value ? null : day;
  }

  /**
   * Check what was chosen as a range.
   * @returns {{from: number, to: number} | {error: string}}
   */
  function range(fromText, toText) {
    const [from, to] = [parse(fromText), parse(toText)];
    if (from === null || to === null) {
      const [what, found] = from === null ? ["first", fromText] : ["last", toText];
      return {
        error: found ? `The ${what} day, ${found}, is no day between 2000 and 2099.` : `Enter the ${what} day.`,
      };
    }
    return from > to ? { error: `The first day, ${fromText}, is after the last, ${toText}.` } : { from, to };
  }

  /** The day a week (Monday to Sunday) or a month begins, each as days since 1970. */
  function beginning(day, unit) {
    if (unit === "day") return day;
    if (unit === "week") return day - ((day + 3) % 7); // 1970-01-01 was a Thursday
    const date = new Date(day * DAY);
    return Date.UTC(date.getUTCFullYear(), date.getUTCMonth(), 1) / DAY;
  }

  function names(from, to, unit) {
    const [year, month, day] = text(from).split("-");
    const spelled = MONTHS[Number(month) - 1];
    if (unit === "day") return { label: text(from), tick: `${spelled} ${Number(day)}` };
    if (unit === "week") return { label: from === to ? text(from) : `${text(from)} to ${text(to)}`, tick: text(from) };
    return { label: `${year}-${month}`, tick: `${spelled} ${year}` };
  }

  /**
   * Cut a range into days, weeks or months, those without a run included.
   * @param {object[]} days of the page data, oldest first
   * @returns {{unit: "day"|"week"|"month", bins: {label: string, tick: string, days: object[]}[]}}
   */
  function bins(days, from, to) {
    const length = to - from + 1;
    const unit = length <= MOST_DAYS ? "day" : length <= MOST_WEEK_DAYS ? "week" : "month";
    const made = new Map();
    for (let day = from; day <= to; day += 1) {
      const start = beginning(day, unit);
      const bin = made.get(start) ?? { from: day, days: [] };
      bin.to = day;
      made.set(start, bin);
    }
    for (const each of within(days, from, to)) made.get(beginning(parse(each.day), unit)).days.push(each);
    return { unit, bins: [...made.values()].map((bin) => ({ ...bin, ...names(bin.from, bin.to, unit) })) };
  }

  /** Return the days, or the runs, of a range. */
  function within(days, from, to) {
    const [first, last] = [text(from), text(to)];
    return days.filter(({ day }) => day >= first && day <= last);
  }

  /** Return the sum of a figure; null where one is not known, or there is none. */
  function sum(days, name) {
    let total = null;
    for (const day of days) {
      if (day[name] === null || day[name] === undefined) return null;
      total = (total ?? 0) + day[name];
    }
    return total;
  }

  /** Return the sum of what is known of some figures, and on how many days any of them is not. */
  function knownSum(days, ...figures) {
    const unknown = days.filter((day) => figures.some((name) => day[name] === null)).length;
    const values = days.flatMap((day) => figures.map((name) => day[name]).filter(tagging.format.known));
    return { value: values.length || !unknown ? values.reduce((a, b) => a + b, 0) : null, unknown };
  }

  /** Return the tags as last counted; null where they were not. */
  function lastTags(days) {
    const last = days.findLast(({ tags }) => tags && Object.keys(tags).length)?.tags;
    return last ? Object.assign(Object.create(null), last) : null; // a tag may be called "constructor"
  }

  /** Return texts per second over all tag steps; null where there was none. */
  function speed(days) {
    const timed = days.filter((day) => tagging.format.known(day.texts_per_second) && day.seconds > 0);
    const seconds = timed.reduce((total, day) => total + day.seconds, 0);
    return seconds ? timed.reduce((total, day) => total + day.texts_per_second * day.seconds, 0) / seconds : null;
  }

  /** Return errors by kind, most frequent first. */
  function kinds(days) {
    const counts = new Map();
    for (const { errors } of days) {
      for (const [kind, number] of Object.entries(errors ?? {})) counts.set(kind, (counts.get(kind) ?? 0) + number);
    }
    return [...counts].sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0]));
  }

  /** Return each tag's mean share of all tags given, over the days on which they were counted. */
  function shares(days) {
    const counted = days.map(({ tags }) => Object.entries(tags ?? {})).filter((tags) => tags.some(([, n]) => n > 0));
    const means = new Map();
    for (const tags of counted) {
      const total = tags.reduce((all, [, number]) => all + number, 0);
      for (const [tag, number] of tags) means.set(tag, (means.get(tag) ?? 0) + number / total / counted.length);
    }
    return counted.length ? means : null;
  }

  /**
   * Return how the tags' shares in the last week of a range differ from those in the four weeks before it, those that
   * moved most first; null where either has no day with tags.
   */
  function movers(days, to) {
    const now = shares(within(days, to - RECENT + 1, to));
    const before = shares(within(days, to - RECENT - BEFORE + 1, to - RECENT));
    if (!now || !before) return null;
    const moved = [...new Set([...now.keys(), ...before.keys()])].map((tag) => {
      const [after, earlier] = [now.get(tag) ?? 0, before.get(tag) ?? 0];
      return { tag, now: after, before: earlier, change: after - earlier };
    });
    return moved.sort((a, b) => Math.abs(b.change) - Math.abs(a.change) || a.tag.localeCompare(b.tag));
  }

  /** Return the changes of model and spec with the bin that each is in, numbered from 1. */
  function changes(cut) {
    const found = cut.flatMap(({ days }, bin) =>
      days.filter((day) => day.changes?.length).map((day) => ({ bin, day: day.day, words: day.changes })),
    );
    return found.map((change, index) => ({ ...change, number: index + 1 }));
  }

  tagging.days = {
    RECENT,
    BEFORE,
    text,
    parse,
    range,
    bins,
    within,
    sum,
    knownSum,
    lastTags,
    speed,
    kinds,
    movers,
    changes,
  };
})(globalThis.tagging);
