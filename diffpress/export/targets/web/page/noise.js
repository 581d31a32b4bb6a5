// Standard normal noise of a seed, equal to that of the Python runtime: numpy's Philox generator and its ziggurat.
//
//     Philox 4x64, 10 rounds, key = [seed, 0]        Salmon et al. 2011
//     ziggurat of 256 layers for float32             Marsaglia and Tsang 2000, numpy's random_standard_normal_fill_f
//
// The tail takes logarithms in float64 instead of float32: 1 value in 30,000 differs in its last bits.

const WORD = (1n << 64n) - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const KEY_STEPS = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];
const ROUNDS = 10;

const LAYERS = 256, RADIUS = 3.6541528853610088, AREA = 0.004928673233974658;
const SCALE = 2 ** 23; // of the random integers
const TABLES = zigguratTables();

/** Return `size` values of the noise of one seed, an integer of 0 to 2^53 - 1. */
export function noiseOf(seed, size) {
  const next = randomIntegers(BigInt(seed)), noise = new Float32Array(size);
  for (let index = 0; index < size; index++) noise[index] = normal(next);
  return noise;
}

/** Return a function that returns the next random integer of 32 bits. */
function randomIntegers(seed) {
  let counter = 0n, block = [];
  return () => {
    if (block.length === 0) block = philox(++counter, seed);
    return block.pop();
  };
}

/** Return 8 random integers of 32 bits, the first at the end. */
function philox(counter, seed) {
  let [a, b, c, d] = [counter & WORD, counter >> 64n, 0n, 0n], keys = [seed, 0n];
  for (let round = 0; round < ROUNDS; round++) {
    const left = a * MULTIPLIERS[0], right = c * MULTIPLIERS[1];
    [a, b, c, d] = [(right >> 64n) ^ b ^ keys[0], right & WORD, (left >> 64n) ^ d ^ keys[1], left & WORD];
    keys = keys.map((key, index) => (key + KEY_STEPS[index]) & WORD);
  }
  return [d, c, b, a].flatMap((word) => [Number(word >> 32n), Number(word & 0xffffffffn)]);
}

function zigguratTables() {
  const density = (x) => Math.exp(-0.5 * x * x), base = AREA / density(RADIUS);
  const limits = new Uint32Array(LAYERS), widths = new Float32Array(LAYERS), heights = new Float32Array(LAYERS);
  limits[0] = (RADIUS / base) * SCALE;
  widths[0] = base / SCALE;
  heights[0] = 1;
  for (let layer = LAYERS - 1, x = RADIUS; layer > 0; layer--) {
    const inner = layer > 1 ? Math.sqrt(-2 * Math.log(AREA / x + density(x))) : 0;
    limits[layer] = (inner / x) * SCALE;
    widths[layer] = x / SCALE;
    heights[layer] = density(x);
    x = inner;
  }
  return { limits, widths, heights };
}

function normal(next) {
  const uniform = () => Math.fround((next() >>> 8) / 2 ** 24);
  for (;;) {
    const bits = next(), layer = bits & 0xff, sign = (bits >>> 8) & 1 ? -1 : 1, size = (bits >>> 9) & (SCALE - 1);
    const x = sign * Math.fround(size * TABLES.widths[layer]);
    if (size < TABLES.limits[layer]) return x;
    if (layer === 0) return tail(uniform, (size >>> 8) & 1 ? -1 : 1);
    const [outer, inner] = [TABLES.heights[layer], TABLES.heights[layer - 1]];
    if ((inner - outer) * uniform() + outer < Math.exp(-0.5 * x * x)) return x;
  }
}

function tail(uniform, sign) {
  for (;;) {
    const x = -Math.log1p(-uniform()) / RADIUS, y = -Math.log1p(-uniform());
    if (y + y > x * x) return sign * (RADIUS + x);
  }
}
