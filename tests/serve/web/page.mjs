// Uses the page of a running server in headless Chromium with the keyboard alone; prints what it showed as JSON.
//   node page.mjs FOLDER_WITH_NODE_MODULES URL SCREENSHOT '{"second": "b", "n": "2", "seed": "3"}'
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, url, screenshot, fields] = process.argv.slice(2);
const load = name => import(pathToFileURL(createRequire(`${folder}/`).resolve(name)));
const chromium = (await load("@sparticuz/chromium")).default, puppeteer = (await load("puppeteer-core")).default;
const browser = await puppeteer.launch({
  args: [...chromium.args, "--no-sandbox"], executablePath: await chromium.executablePath(), headless: "shell",
});
try {
  const page = await browser.newPage(), requests = [], problems = [];
  await page.setViewport({ width: 1000, height: 800 });
  page.on("request", request => requests.push(request.url()));
  page.on("console", message => ["error", "warn"].includes(message.type()) && problems.push(message.text()));
  page.on("pageerror", error => problems.push(String(error)));
  await page.evaluateOnNewDocument(() => {  // every text of a preview's source that was shown
    window.shown = new Set();
    new MutationObserver(all => all.forEach(one => one.attributeName === "src" && shown.add(one.target.src)))
      .observe(document, { subtree: true, attributes: true, attributeFilter: ["src"] });
  });
  await page.goto(url);
  await page.waitForFunction(() => document.querySelector("[name=first]").options.length > 0);
  const wanted = JSON.parse(fields), reached = [];
  for (let presses = 0; presses < 40; presses++) {  // by Tab, as without a mouse
    await page.keyboard.press("Tab");
    const name = await page.evaluate(() => document.activeElement.name || document.activeElement.textContent);
    reached.push(name);
    if (name in wanted) {
      if (await page.evaluate(() => document.activeElement.tagName === "SELECT")) {
        await page.select(`[name=${name}]`, wanted[name]);
      } else {
        await page.evaluate(() => document.activeElement.select());
        await page.keyboard.type(wanted[name]);
      }
    }
    if (name === "Sample") break;
  }
  const names = [];
  const collect = node => {
    if (["textbox", "spinbutton", "combobox", "button"].includes(node.role)) names.push(node.name || "");
    (node.children || []).forEach(collect);
  };
  collect(await page.accessibility.snapshot());
  await page.keyboard.press("Enter");
  await page.waitForFunction(
    () => document.getElementById("status").textContent.startsWith("Finished") || document.getElementById("error").textContent);
  await page.screenshot({ path: screenshot, fullPage: true });
  const found = await page.evaluate(() => ({
    status: document.getElementById("status").textContent,
    error: document.getElementById("error").textContent,
    titles: [...document.querySelectorAll("h2")].map(title => title.textContent),
    facts: [...document.querySelectorAll(".facts")].map(fact => fact.textContent),
    images: [...document.querySelectorAll(".images img")].map(image => ({ src: image.src, alt: image.alt })),
    shown: window.shown.size,
  }));
  console.log(JSON.stringify({ ...found, requests, problems, reached, names }));
} finally {
  await browser.close();
}
