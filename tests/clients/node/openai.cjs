// What a Node program does with the official client, against BASE_URL. Prints one JSON object of what it saw.
"use strict";
const OpenAI = require("openai");

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0, timeout: 60000 });
const model = process.env.MODEL || "support";
const ask = (content) => [{ role: "user", content }];
const limit = { max_tokens: 8, temperature: 0 };
const tools = [
  { type: "function", function: { name: "weather", parameters: { type: "object", properties: {} } } },
  { type: "function", function: { name: "time", parameters: { type: "object", properties: {} } } },
];

// An error as a program sees it: the class it would catch, the status, the words.
async function failure(work) {
  try {
    await work();
  } catch (err) {
    return { kind: err.constructor.name, status: err.status ?? null, message: String(err.message) };
  }
  return null;
}

const scenarios = {
  async chat() {
    const { data, response } = await client.chat.completions
      .create({ model, messages: ask("hi"), seed: 3, n: 2, ...limit })
      .withResponse();
    return {
      texts: data.choices.map((c) => c.message.content),
      usage: data.usage,
      arm: response.headers.get("x-stillhouse-arm"),
      id: data._request_id,
    };
  },
  async chat_stream() {
    const texts = [];
    let usage = null;
    const stream = await client.chat.completions.create({
      model, messages: ask("hi"), stream: true, stream_options: { include_usage: true }, ...limit,
    });
    for await (const chunk of stream) {
      if (chunk.choices.length) texts.push(chunk.choices[0].delta.content ?? "");
      usage = chunk.usage ?? usage;
    }
    return { text: texts.join(""), usage };
  },
  async tool_stream() {
    const runner = client.chat.completions.stream({ model, messages: ask("weather?"), tools });
    const message = await runner.finalMessage();
    return { calls: (message.tool_calls ?? []).map((c) => [c.function.name, c.function.arguments]) };
  },
  async completion() {
    const done = await client.completions.create({ model, prompt: "hi", ...limit });
    return { text: done.choices[0].text };
  },
  async responses() {
    const done = await client.responses.create({ model, input: "hi", max_output_tokens: 8, temperature: 0 });
    return { text: done.output_text, usage: done.usage };
  },
  async responses_stream() {
    const kinds = [];
    let text = "";
    const stream = await client.responses.create({
      model, input: "hi", stream: true, max_output_tokens: 8, temperature: 0,
    });
    for await (const event of stream) {
      kinds.push(event.type);
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    return { text, first: kinds[0], last: kinds[kinds.length - 1] };
  },
  async embeddings() {
    const found = await client.embeddings.create({ model, input: "x", encoding_format: "float" });
    return { vector: found.data[0].embedding };
  },
  async models() {
    const names = [];
    for await (const found of client.models.list()) names.push(found.id);
    return { names, one: (await client.models.retrieve(model)).id };
  },
  async errors() {
    return {
      unknown: await failure(() => client.chat.completions.create({ model: "nobody", messages: ask("x") })),
      bad: await failure(() => client.post("/chat/completions", { body: { messages: ask("x") } })),
    };
  },
  async broken() {
    const streams = {
      chat: () => client.chat.completions.create({ model, messages: ask("x"), stream: true }),
      responses: () => client.responses.create({ model, input: "x", stream: true }),
    };
    const seen = {};
    for (const [name, start] of Object.entries(streams)) {
      seen[name] = await failure(async () => {
        for await (const _ of await start()) {}
      });
    }
    return seen;
  },
};

(async () => {
  const seen = {};
  for (const name of process.env.SCENARIOS.split(",")) seen[name] = await scenarios[name]();
  process.stdout.write(JSON.stringify(seen));
})();
