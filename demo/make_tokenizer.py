"""The demo's tokenizer: byte-level BPE trained on the pretraining text.

    python demo/make_tokenizer.py CACHE/train DIRECTORY

It writes tokenizer.json and tokenizer_config.json to DIRECTORY.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 2048
END = "<|endoftext|>"


def main(text, directory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(sorted(map(str, Path(text).glob("*.txt"))), trainer)
    tokenizer.save(f"{directory}/tokenizer.json")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": 256}
    Path(directory, "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("text", metavar="CACHE/train")
    parser.add_argument("directory", metavar="DIRECTORY")
    main(**vars(parser.parse_args()))
