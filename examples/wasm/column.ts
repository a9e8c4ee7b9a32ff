// column NAME: count, sum, smallest, largest and mean of one column of a CSV table on standard input.
//
// An AssemblyScript program. With @assemblyscript/wasi-shim its process, its input and its output are those of WASI. It
// ends with 0, or with 2 when there is no such column, or with 3 when a value in it is no number.

const words = process.argv.slice(1);

function fail(text: string, code: i32): void {
  process.stderr.write("column: " + text + "\n");
  process.exit(code);
}

function readAll(): string {
  const pieces = new Array<ArrayBuffer>();
  let total = 0;
  const buffer = new ArrayBuffer(16384);
  for (;;) {
    const size = <i32>process.stdin.read(buffer);
    if (size <= 0) break;
    pieces.push(buffer.slice(0, size));
    total += size;
  }
  const all = new Uint8Array(total);
  let at = 0;
  for (let i = 0; i < pieces.length; i++) {
    all.set(Uint8Array.wrap(pieces[i]), at);
    at += pieces[i].byteLength;
  }
  return String.UTF8.decode(all.buffer);
}

if (words.length != 1) fail("usage: column NAME < TABLE.csv", 64);

const lines = readAll().split("\n");
const names = lines[0].trim().split(",");
const place = names.indexOf(words[0]);
if (place < 0) fail("there is no column " + words[0], 2);

let count = 0;
let sum: f64 = 0;
let least: f64 = Infinity;
let most: f64 = -Infinity;
for (let i = 1; i < lines.length; i++) {
  const line = lines[i].trim();
  if (line.length == 0) continue;
  const fields = line.split(",");
  const value = place < fields.length ? parseFloat(fields[place]) : NaN;
  if (isNaN(value)) fail("line " + (i + 1).toString() + ": not a number", 3);
  count++;
  sum += value;
  least = min(least, value);
  most = max(most, value);
}

process.stdout.write("count " + count.toString() + "\n");
if (count > 0) {
  process.stdout.write("sum " + sum.toString() + "\n");
  process.stdout.write("min " + least.toString() + "\n");
  process.stdout.write("max " + most.toString() + "\n");
  process.stdout.write("mean " + (sum / <f64>count).toString() + "\n");
}
