"""GGUF files: converted once into a folder of safetensors in the user's cache.

Loading a GGUF file dequantises it tensor by tensor every time; the converted folder loads an order
of magnitude faster. Values survive: block-quantised and fp16 files become fp16, bf16 files bf16,
files with fp32 matrices fp32.
"""

from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from cache.errors import ModelError
from cache.extras import need
from cache.progress import track
from cache.user_folder import private_temporary, publish, storage_errors
from knowledge_extract.quiet import quiet


@dataclass(frozen=True)
class Conversion:
    """One GGUF file and the folder its two converted halves live in.

    Args:
        path: the GGUF file.
        root: named by the file's digest, so a changed file never meets an old conversion.
    """

    path: Path
    root: Path

    def tokenizer(self) -> Path:
        """The folder with configuration and tokenizer, made if it is not there."""
        return self._once("tokenizer", self._write_tokenizer)

    def weights(self) -> Path:
        """The folder with the weights as safetensors, made if it is not there."""
        return self._once("weights", self._write_weights)

    def _once(self, name: str, write: Any) -> Path:
        target = self.root / name
        if target.is_dir():
            return target
        need("reading a GGUF file", "gguf", extra="extract")
        label = f"converting {self.path.name} ({name})"
        with storage_errors(self.root), private_temporary(self.root, name) as work:
            with track(label, 1) as progress:
                self._guarded(write, work)
                progress.advance()
            publish(work, target)
        return target

    def _guarded(self, write: Any, work: Path) -> None:
        try:
            with quiet(), redirect_stderr(StringIO()):  # a bar that no switch turns off
                write(work)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk; anything else is the library's word for an odd file
            what = "this GGUF file cannot be converted"
            found = str(error)[:300] or type(error).__name__
            raise ModelError(what, where=self.path.name, found=found) from error

    def _write_tokenizer(self, work: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        at, name = str(self.path.parent), self.path.name
        AutoTokenizer.from_pretrained(at, gguf_file=name).save_pretrained(work)
        config = AutoConfig.from_pretrained(at, gguf_file=name)
        config.name_or_path = ""
        config.save_pretrained(work)

    def _write_weights(self, work: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        dtype = getattr(torch, kept_dtype(self.path))
        model = AutoModelForCausalLM.from_pretrained(
            str(self.path.parent),
            gguf_file=self.path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
        )
        for name, tensor in model.state_dict().items():
            if not torch.isfinite(tensor).all():
                what = f"the tensor {name} does not fit {dtype}"
                raise ModelError(what, where=self.path.name)
        model.save_pretrained(work)


def kept_dtype(path: Path) -> str:
    """The torch dtype that holds a GGUF file's matrices without loss of their precision."""
    import gguf

    kinds = {t.tensor_type.name for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1}
    if kinds & {"F32", "F64"}:
        return "float32"
    return "bfloat16" if "BF16" in kinds else "float16"
