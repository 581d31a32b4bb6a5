// CLIP's tokenizer: a tokenizer.json of the `tokenizers` library -> ids of a prompt.
//
//     normalize: NFC, white space to a space, lower case     split: words, digits, other signs     byte-level BPE
//
// Byte-level: every byte of the UTF-8 text is one printable character, and the last of a piece has the suffix </w>. BPE
// joins the neighbours whose merge comes first in the list, until there is none. The export refuses other tokenizers.

// \s of the Python library is Unicode's white space
const inUnicode = (pattern, flags) => new RegExp(pattern.replaceAll("\\s", "\\p{White_Space}"), flags);
const GPT2 = inUnicode("'(?:s|t|re|ve|m|ll|d)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", "gu");
const WHITE_SPACE = inUnicode("\\s+", "gu");
const BYTES = byteLetters();

/** Return a function (prompt, length, pad) -> {ids, mask}, two BigInt64Array of `length`. */
export function openTokenizer(file) {
  const { model, added_tokens: added, pre_tokenizer: splitter, post_processor: special } = file;
  const ranks = new Map(model.merges.map((pair, rank) => [pairOf(pair).join(" "), rank]));
  const [words] = splitter.pretokenizers.map((step) => step.pattern?.Regex).filter(Boolean).map((p) => inUnicode(p, "gu"));
  const special_ids = new Map(added.map((token) => [token.content, token.id]));
  const known = new Map();

  const idsOfPiece = (piece) => {
    if (!known.has(piece)) {
      const unknown = model.vocab[model.unk_token];
      known.set(piece, merged(letters(piece, model.end_of_word_suffix), ranks).map((part) => model.vocab[part] ?? unknown));
    }
    return known.get(piece);
  };
  const idsOfText = (text) => (normalized(text).match(words) ?? []).flatMap((word) => word.match(GPT2).flatMap(idsOfPiece));

  return (prompt, length, pad) => {
    const found = pieces(prompt, special_ids).flatMap((part) => (typeof part === "number" ? [part] : idsOfText(part)));
    const ids = [special.cls[1], ...found.slice(0, length - 2), special.sep[1]];
    const mask = Array.from({ length }, (_, index) => (index < ids.length ? 1 : 0));
    while (ids.length < length) ids.push(pad);
    return { ids: BigInt64Array.from(ids, BigInt), mask: BigInt64Array.from(mask, BigInt) };
  };
}

/** Return the text between added tokens, and the ids of these tokens, in order. */
function pieces(text, ids) {
  const escaped = [...ids.keys()].map((token) => token.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
  return text.split(new RegExp(`(${escaped.join("|")})`, "u")).map((part) => ids.get(part) ?? part);
}

function normalized(text) {
  const spaced = text.normalize("NFC").replace(WHITE_SPACE, " ");
  return Array.from(spaced, (letter) => letter.toLowerCase()).join(""); // by itself: no rule for a final sigma
}

function letters(piece, suffix) {
  const found = Array.from(new TextEncoder().encode(piece), (byte) => BYTES[byte]);
  found[found.length - 1] += suffix;
  return found;
}

function merged(parts, ranks) {
  for (;;) {
    let best = -1, lowest = Infinity;
    for (let index = 0; index + 1 < parts.length; index++) {
      const rank = ranks.get(`${parts[index]} ${parts[index + 1]}`) ?? Infinity;
      if (rank < lowest) [best, lowest] = [index, rank];
    }
    if (best < 0) return parts;
    parts.splice(best, 2, parts[best] + parts[best + 1]);
  }
}

function pairOf(merge) {
  return typeof merge === "string" ? merge.split(" ") : merge;
}

/** Return the character of every byte: printable ones stand for themselves, the others for those from 256 on. */
function byteLetters() {
  const isPrintable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(isPrintable(byte) ? byte : next++));
}
