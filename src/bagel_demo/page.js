// Buttons of the conversation tell the page what they are for.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (button) trigger("click", { act: button.dataset.act, value: button.dataset.value ?? "" });
});

// Thoughts that somebody unfolded stay so when more is said.
const unfolded = new WeakSet();
element.addEventListener("click", (event) => {
  const thought = event.target.closest("summary")?.parentElement;
  if (thought) thought.open ? unfolded.delete(thought) : unfolded.add(thought);
});

// Whoever reads the end sees what comes; whoever reads further up is left there.
const box = element.closest("#talk");
let isAtEnd = true;
box.addEventListener("scroll", () => {
  isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
});
new ResizeObserver(() => {
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}).observe(element);
watch("value", () => {
  element.querySelectorAll("details").forEach((thought) => (thought.open = unfolded.has(thought)));
});

// Until now nobody would have heard a click.
box.dataset.ready = "true";
