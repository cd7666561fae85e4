// Elements from data: strings only ever become text nodes and attribute values, never markup.

/** @typedef {Node|string|number|null|undefined|false|Array<any>} Child */

/** @param {Element} element @param {Object<string, any>|null} attributes @param {Child[]} children */
function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.replace(/^on/, ""), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  put(element, ...children);
  return element;
}

/** @param {Element|DocumentFragment} element @param {Child[]} children */
export function put(element, ...children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) put(element, ...child);
    else element.append(child instanceof Node ? child : String(child));
  }
}

/**
 * An HTML element. Attributes that are null or false are left out; a function is a listener (`onclick`).
 * @param {string} tag @param {Object<string, any>|null} [attributes] @param {Child[]} children
 * @returns {any}
 */
export const h = (tag, attributes = null, ...children) => filled(document.createElement(tag), attributes, children);

/**
 * An SVG element.
 * @param {string} tag @param {Object<string, any>|null} [attributes] @param {Child[]} children
 * @returns {any}
 */
export const svg = (tag, attributes = null, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** Replace what an element holds. @param {Element} element @param {Child[]} children */
export function fill(element, ...children) {
  element.replaceChildren();
  put(element, ...children);
}
