const told = document.getElementById("told"), late = document.getElementById("late");
const written = Number(told.dataset.written), limit = Number(told.dataset.limit);
const age = () => {
  const seconds = Math.max(0, Math.round(Date.now() / 1000 - written));
  told.textContent = `written ${seconds} s ago`;
  late.hidden = seconds <= limit;
};
if (limit > 0) {
  age();
  setInterval(age, 1000);
}
