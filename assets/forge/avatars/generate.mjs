// Reads DiceBear pixelArt options as JSON lines on stdin; writes {svg, extra} lines to stdout.
import { createInterface } from "node:readline";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The packages are installed in the scratch folder the command runs in, not beside this file.
const require = createRequire(pathToFileURL(`${process.cwd()}/package.json`));
const load = async (name) => import(pathToFileURL(require.resolve(name)));
const { createAvatar } = await load("@dicebear/core");
const pixelArt = await load("@dicebear/pixel-art");

const out = [];
for await (const line of createInterface({ input: process.stdin })) {
  const avatar = createAvatar(pixelArt, JSON.parse(line));
  const svg = avatar
    .toString()
    .replace(/<metadata.*?<\/metadata>/s, "") // half of the text, and nothing is drawn by it
    // DiceBear draws a beard through a mask filled with the hair colour, so that a dark beard
    // would be invisible; a white mask gives every beard the same strength.
    .replace(/(<mask id="beard.*?fill=")[^"]*/s, "$1#fff");
  out.push(JSON.stringify({ svg, extra: avatar.toJson().extra }));
  if (out.length === 1000) process.stdout.write(out.splice(0).join("\n") + "\n");
}
if (out.length) process.stdout.write(out.join("\n") + "\n");
