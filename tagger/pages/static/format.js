/** Numbers, money and times as a reader has them. What is not known (null) is "unknown", never 0. */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const UNKNOWN = "unknown";
  const NBSP = "\u00a0";
  const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
  const cents = new Intl.NumberFormat("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
  const fine = new Intl.NumberFormat("en-US", { minimumFractionDigits: 4, maximumFractionDigits: 4 });
  const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });

  const known = (value) => typeof value === "number" && Number.isFinite(value);

  /** "1,234" */
  const count = (value) => (known(value) ? whole.format(value) : UNKNOWN);

  /** "12.3K", for an axis */
  const short = (value) => (known(value) ? compact.format(value) : "");

  /** "$0.0123", "$12.34" or "$1,234" */
  function usd(value) {
    if (!known(value)) return UNKNOWN;
    const size = Math.abs(value);
    const sign = value < 0 ? "−" : "";
    if (size === 0) return "$0.00";
    if (size < 0.00005) return `${sign}under${NBSP}$0.0001`;
    if (size < 0.99995) return `${sign}$${fine.format(size)}`;
    return `${sign}$${size < 999.995 ? cents.format(size) : whole.format(size)}`;
  }

  /** "$0.002" or "$1.2K", for an axis */
  function shortUsd(value) {
    if (value === 0) return "$0";
    return Math.abs(value) < 1000 ? `$${Number(value.toPrecision(3))}` : `$${compact.format(value)}`;
  }

  /**
   * A sum of which a part is not known: "at least $12.34".
   * @param {{value: number|null, unknown: number}} sum
   */
  function atLeast(sum, format) {
    if (sum.value === null) return UNKNOWN;
    return sum.unknown ? `at least ${format(sum.value)}` : format(sum.value);
  }

  /** 0.123 as "12.3 %"; few digits where many say nothing */
  function percent(share) {
    if (!known(share)) return UNKNOWN;
    const value = share * 100;
    if (value > 0 && value < 0.1) return `under${NBSP}0.1${NBSP}%`;
    const digits = Math.abs(value) >= 99.95 || Number.isInteger(Math.round(value * 1e6) / 1e6) ? 0 : 1;
    return `${value.toFixed(digits)}${NBSP}%`;
  }

  /** 0.0213 as "2.13 points": the difference of two shares */
  function points(difference) {
    const size = Math.abs(difference) * 100;
    return size < 0.01 ? `under${NBSP}0.01${NBSP}points` : `${size.toFixed(2)}${NBSP}points`;
  }

  /** "12.3" */
  function rate(value) {
    if (!known(value)) return UNKNOWN;
    return value >= 100 ? whole.format(value) : String(Number(value.toPrecision(3)));
  }

  /** "4.9 s", "3 min 12 s" or "1 h 05 min" */
  function duration(seconds) {
    if (!known(seconds)) return UNKNOWN;
    if (seconds < 59.95) return `${seconds < 10 ? Math.round(seconds * 10) / 10 : Math.round(seconds)}${NBSP}s`;
    const total = Math.round(seconds);
    const [hours, minutes] = [Math.floor(total / 3600), Math.floor((total % 3600) / 60)];
    if (hours) return `${hours}${NBSP}h${NBSP}${String(minutes).padStart(2, "0")}${NBSP}min`;
    return `${minutes}${NBSP}min${NBSP}${String(total % 60).padStart(2, "0")}${NBSP}s`;
  }

  /** "3 runs", "1 run" */
  const plural = (number, one, many = `${one}s`) => `${count(number)}${NBSP}${number === 1 ? one : many}`;

  function partsIn(zone, instant) {
    const options = { year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit" };
    const format = (timeZone) => new Intl.DateTimeFormat("en-CA", { ...options, hourCycle: "h23", timeZone });
    let named = zone || "UTC";
    let parts;
    try {
      parts = format(named).formatToParts(instant);
    } catch {
      named = "UTC"; // a zone that this browser does not know
      parts = format(named).formatToParts(instant);
    }
    return { named, ...Object.fromEntries(parts.map(({ type, value }) => [type, value])) };
  }

  /** The instant in a zone, which is named: "2026-11-23 10:04 Asia/Tokyo" */
  function time(iso, zone) {
    const instant = new Date(iso ?? NaN);
    if (Number.isNaN(instant.getTime())) return UNKNOWN;
    const { year, month, day, hour, minute, named } = partsIn(zone, instant);
    return `${year}-${month}-${day} ${hour}:${minute} ${named}`;
  }

  /** The day in a zone: "2026-11-23" */
  function dayOf(instant, zone) {
    const { year, month, day } = partsIn(zone, instant);
    return `${year}-${month}-${day}`;
  }

  /** "2 h ago", "in 5 h" */
  function ago(iso, now = Date.now()) {
    const seconds = (now - new Date(iso ?? NaN).getTime()) / 1000;
    if (Number.isNaN(seconds)) return UNKNOWN;
    const size = Math.abs(seconds);
    if (size < 60) return seconds < 0 ? "in a moment" : "just now";
    const [amount, unit] =
      size < 3600 ? [size / 60, "min"] : size < 172800 ? [size / 3600, "h"] : [size / 86400, "days"];
    const told = `${Math.floor(amount)}${NBSP}${unit}`;
    return seconds < 0 ? `in ${told}` : `${told} ago`;
  }

  /** A long name, cut for a place that cannot wrap it */
  function cut(name, length = 40) {
    const letters = [...name];
    return letters.length > length ? `${letters.slice(0, length - 1).join("")}…` : name;
  }

  tagging.format = {
    UNKNOWN,
    known,
    count,
    short,
    usd,
    shortUsd,
    atLeast,
    percent,
    points,
    rate,
    duration,
    plural,
    time,
    dayOf,
    ago,
    cut,
  };
})(globalThis.tagging);
