// A canvas that sends its pixels while the pen is down. gradio hands over `element`, `props` and `trigger`.
const canvas = element.querySelector("canvas")
const pen = canvas.getContext("2d")
const [undo, clear] = element.querySelectorAll("button")
let lines = []      // each a list of points [x, y], so that the last line can be taken back
let pointer = null  // the mouse, pen or finger that is drawing
let timer = null    // until the drawing is sent again

function paint(width = 6) {
  Object.assign(pen, {lineCap: "round", lineJoin: "round", fillStyle: "white", lineWidth: width})
  pen.fillRect(0, 0, canvas.width, canvas.height)
  for (const line of lines) {
    pen.beginPath()
    for (const [x, y] of line) pen.lineTo(x, y)
    pen.stroke()
  }
}

function extent(axis) {
  const values = lines.flat().map(point => point[axis])
  return Math.max(...values) - Math.min(...values)
}

// The lines are sent with 3 % of the drawing's length as their width, and shown with one width.
function send() {
  clearTimeout(timer)
  timer = null
  paint(Math.max(2, 0.03 * Math.max(extent(0), extent(1))))
  props.value = canvas.toDataURL()
  paint()
  trigger("input")
}

function add(x, y) {
  const box = canvas.getBoundingClientRect()
  lines.at(-1).push([(x - box.left) / box.width * canvas.width, (y - box.top) / box.height * canvas.height])
  paint()
  timer ??= setTimeout(send, 400)
}

canvas.onpointerdown = event => {
  if (pointer !== null || event.button) return
  pointer = event.pointerId
  canvas.setPointerCapture(pointer)
  lines.push([])
  add(event.clientX, event.clientY)
  add(event.clientX + 0.1, event.clientY)  // a dot is a line, too
}
canvas.onpointermove = event => {
  if (event.pointerId === pointer) add(event.clientX, event.clientY)
}
canvas.onpointerup = canvas.onpointercancel = event => {
  if (event.pointerId !== pointer) return
  pointer = null
  send()
}
undo.onclick = () => { lines.pop(); paint(); send() }
clear.onclick = () => { lines = []; paint(); send() }
paint()
