// Whatever comes from outside becomes a text node here, never markup.

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(child))));
  return made;
}

export function say(id, text) {
  const node = byId(id);
  if (node.textContent !== text) node.textContent = text; // a screen reader reads changes alone
}

export function showMeter(id, share, text) {
  byId(id).value = share;
  say(`${id}-text`, text);
}

export function number(value) {
  const digits = value >= 100 || Number.isInteger(value) ? 0 : 1;
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (n >= 1024 && power < units.length - 1) {
    n /= 1024;
    power += 1;
  }
  return `${number(n)} ${units[power]}`;
}

export function seconds(s) {
  return s < 1 ? `${number(s * 1000)} ms` : `${number(s)} s`;
}
