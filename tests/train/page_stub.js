// As much of a browser's document as curves.js needs: elements with attributes, children and listeners.
class Element {
  constructor(tag) { Object.assign(this, {tag, attributes: {}, children: [], listeners: {}, style: {}, textContent: ""}); }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  appendChild(child) { this.children.push(child); child.parent = this; return child; }
  replaceChildren() { this.children = []; }
  remove() { this.parent.children = this.parent.children.filter(each => each !== this); }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  getBoundingClientRect() { return {left: 0, width: 600}; }
  all(tag) { return this.children.flatMap(each => [...(each.tag === tag ? [each] : []), ...each.all(tag)]); }
}
const byId = {charts: new Element("div"), runs: new Element("p"), curves: new Element("script")};
globalThis.document = {
  getElementById: id => byId[id],
  createElement: tag => new Element(tag),
  createElementNS: (_, tag) => new Element(tag),
};
byId.curves.textContent = CURVES;
const charts = () => byId.charts.all("figure").map(figure => ({
  title: figure.all("figcaption")[0].textContent,
  lines: figure.all("polyline").map(line => line.attributes.points.split(" ").map(point => point.split(",").map(Number))),
  texts: figure.all("text").map(text => text.textContent),
}));
const fire = (element, name, clientX) => element.listeners[name]({clientX});
