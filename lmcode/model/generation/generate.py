"""Autoregressive generation with the memories in use.

A stream is read as in training: in windows of at most `context_length` tokens, the first of which starts at the prompt's
first token. Within a window a `Cache` makes each new token cost a pass over one token. When a window is full it is read once
more as a whole, in an ordinary pass, which hands its candidates to `commit` and carries the state into the next window: so
whatever lies further back than one window reaches the model through its memories, as it did in training.

Every stream keeps its own place: neither left padding nor the other rows of a batch move its windows. Which passes are made
depends on the tokens alone, so ranks that hold the same tokens make the same collective calls. Inside a region of autocast
the text is the one that would be written outside of it: nothing here runs under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmcode.model.cache import Cache
from lmcode.model.generation.decode import Decoder, steppable
from lmcode.model.generation.sampling import Decoding, next_token
from lmcode.model.inputs import IGNORED
from lmcode.model.lm import LMCODEOutput, MemoryLM
from lmcode.model.mode import in_eval_mode
from lmcode.model.state import StreamState, check_state, rows_of, with_rows
from lmcode.precision import without_autocast

Prompts = Tensor | Sequence[Sequence[int]]
FEW_TOKENS = 32  # for so few new tokens, copies of the weights cost more time than they save


class Generation(NamedTuple):
    """What `generate` returns.

    tokens_BT: int64, the prompts as they were given (lists are padded on the left, with `eos_id` or 0) and what was added.
        Streams that ended are padded with `eos_id`; T is shorter than asked for if all of them ended.
    valid_BT: bool, False at padding on either side; an `eos_id` that the model chose is no padding.
    state: what the streams carry on, having read all their tokens; None unless `finish` was asked for.
    """

    tokens_BT: Tensor
    valid_BT: Tensor
    state: StreamState | None

    def rows(self) -> list[list[int]]:
        """Each stream's tokens without padding."""
        return [row_T[valid_T].tolist() for row_T, valid_T in zip(self.tokens_BT, self.valid_BT, strict=True)]


@torch.no_grad()
@without_autocast()
def generate(model: MemoryLM, prompts: Prompts, decoding: Decoding | None = None, *,
             attention_mask: Tensor | None = None, namespace_B: Tensor | None = None, window: int | None = None,
             state: StreamState | None = None, use_cache: bool = True, finish: bool = False,
             commit: Callable[[LMCODEOutput], None] | None = None, on_token: Callable[[Tensor], None] | None = None,
             agree: Callable[[Tensor], Tensor] | None = None) -> Generation:
    """Continues every prompt.

    Args:
        model: runs in eval mode and is left in the mode it came in.
        prompts: integer [B, T], or a list of lists of ids, which may differ in length.
        decoding: what to add; the defaults of `Decoding` when None.
        attention_mask: bool or 0/1 [B, T], 0 at padding, which must lead; ids there are not looked at.
        namespace_B: int64, the document that each stream is in; see `MemoryLM.forward`.
        window: tokens of a window; the model's context length when None.
        state: what the streams carry over from an earlier call; the prompts then continue them, in a new window.
        use_cache: False reads the whole window again for every token: slow, the oracle of the cache. So it is for a model
            with adapters or hooks in it or a cache of former windows, and under ZeRO-3 (`decode.steppable`).
        finish: read the last token and close the last windows, which are committed too, and return the state.
        commit: called with the output of every closed window (and rows of these streams only), to write what was read.
        on_token: called with the tokens int64 [B] of every step, those of ended streams being `eos_id`.
        agree: called with the tokens that this rank chose; returns those that all ranks take. With it, ranks that were
            given the same arguments make the same passes, whatever rounding did to their logits.

    Raises:
        ValueError: for prompts, a mask, a window, namespaces, a state or an `eos_id` that cannot be, or a `max_length`
            that leaves no room.
    """
    decoding = decoding or Decoding()
    if not isinstance(prompts, Tensor | Sequence):
        raise ValueError(f"prompts must be a tensor of ids [B, T] or a list of lists of ids: got {prompts!r:.60}")
    ids_BT, valid_BT = padded_prompts(prompts, attention_mask, decoding, device=model.embedding.weight.device)
    _check(model, ids_BT, valid_BT, decoding, window)
    _check_streams(model, len(ids_BT), namespace_B, state)
    num_new, eos_id = decoding.num_new_tokens(ids_BT.shape[1]), decoding.eos_id
    rows = [ids_T[valid_T].tolist() for ids_T, valid_T in zip(ids_BT, valid_BT, strict=True)]
    reader = StreamReader(model, rows, namespace_B=namespace_B, window=window or model.config.context_length, state=state,
                    use_cache=use_cache, copies=num_new > FEW_TOKENS, best=decoding.best, commit=commit,
                    device=ids_BT.device)
    generator = None if decoding.seed is None else torch.Generator(ids_BT.device).manual_seed(decoding.seed)
    added: list[Tensor] = []  # tokens [B] of each step, and which streams were live then
    live: list[list[bool]] = []
    with in_eval_mode(model):
        while num_new > 0 and any(reader.live):
            token_B = next_token(reader.logits(), rows, decoding, generator)
            token_B = token_B if agree is None else agree(token_B)
            if eos_id is not None:
                token_B = token_B.where(torch.tensor(reader.live, device=token_B.device), eos_id)
            added.append(token_B)
            live.append(list(reader.live))
            reader.append(token_B.tolist(), eos_id)
            if on_token is not None:
                on_token(token_B)
            num_new -= 1
        ids_BT = torch.cat([ids_BT, *(token_B[:, None] for token_B in added)], dim=1)
        live_TB = torch.tensor(live, dtype=torch.bool, device=ids_BT.device).view(-1, len(rows))
        valid_BT = torch.cat([valid_BT, live_TB.t()], dim=1)
        return Generation(ids_BT, valid_BT, reader.finish() if finish else None)


class StreamReader:
    """Reads streams that grow, each in windows of its own.

    Attributes:
        rows: all tokens of each stream, without padding.
        live: streams that have not ended.
    """

    def __init__(self, model: MemoryLM, rows: list[list[int]], *, namespace_B: Tensor | None, window: int,
                 state: StreamState | None, use_cache: bool, copies: bool = False, best: int | None = None,
                 commit: Callable[[LMCODEOutput], None] | None, device: torch.device) -> None:
        self.rows, self.live = rows, [True] * len(rows)
        self._model, self._window, self._commit, self._device = model, window, commit, device
        self._namespace_B = torch.arange(len(rows), device=device) if namespace_B is None else namespace_B
        self._starts = [0] * len(rows)  # where each stream's window begins
        self._state = model.blank_state(len(rows), device=device) if state is None else state
        self._fresh_B = torch.full((len(rows),), state is None, device=device)
        # The keys and values of a cache of former windows are made anew in every pass, so such a model reads whole windows.
        self._cache = Cache(window) if use_cache and not model.config.cache_tokens and steppable(model) else None
        self._decoder = None if self._cache is None else Decoder(model, rows=len(rows), copies=copies, best=best)

    def append(self, tokens: Sequence[int], eos_id: int | None) -> None:
        """Adds one token to each live stream; a stream that takes `eos_id` has ended."""
        for stream, token in enumerate(tokens):
            if self.live[stream]:
                self.rows[stream].append(token)
                self.live[stream] = token != eos_id

    def logits(self) -> Tensor:
        """Logits [B, X] of each stream's next token, X ids, of which the best are right; of ended streams, any numbers."""
        self._close_full()
        if self._decoder is not None and self._cache is not None and self._cache.lengths:
            last_B = torch.tensor([row[-1] for row in self.rows], device=self._device)
            return self._decoder(last_B, self._cache, namespace_B=self._namespace_B, valid=self.live)
        ids_BT, valid_BT = self._padded([row[start:] for row, start in zip(self.rows, self._starts, strict=True)])
        output: LMCODEOutput = self._model(ids_BT, state=self._state, reset_B=self._fresh_B, namespace_B=self._namespace_B,
                                           valid_BT=valid_BT, cache=self._cache)
        if valid_BT is None:
            return output.logits[:, -1]
        return output.logits[torch.arange(len(ids_BT), device=self._device), valid_BT.sum(dim=1) - 1]

    def finish(self) -> StreamState:
        """Closes all windows, full or not; the state in which a next prompt finds the streams."""
        self._close_full()
        self._close(list(range(len(self.rows))))
        return self._state

    def _close_full(self) -> None:
        """Closes every window that has a token after it, until each stream stands in its last one."""
        while full := [stream for stream, (row, start) in enumerate(zip(self.rows, self._starts, strict=True))
                       if len(row) - start > self._window]:
            self._close(full)

    def _close(self, streams: list[int]) -> None:
        """Reads the windows of some streams as a whole, commits them, and puts the streams at their ends."""
        length, starts = self._window, [self._starts[stream] for stream in streams]
        parts = [self.rows[stream][start:start + length] for stream, start in zip(streams, starts, strict=True)]
        following = [self.rows[stream][start + 1:start + length + 1]
                     for stream, start in zip(streams, starts, strict=True)]
        ids_BT, valid_BT = self._padded(parts)
        targets_BT = torch.tensor([[*ids, *[IGNORED] * (ids_BT.shape[1] - len(ids))] for ids in following],
                                  device=self._device)
        output = self._model(ids_BT, targets_BT=targets_BT, state=rows_of(self._state, streams),
                             reset_B=self._fresh_B[streams], namespace_B=self._namespace_B[streams], valid_BT=valid_BT)
        self._state = with_rows(self._state, streams, output.state)
        self._fresh_B[streams] = False
        for stream, part in zip(streams, parts, strict=True):
            self._starts[stream] += len(part)
        if self._cache is not None and self._cache.lengths:
            with torch.inference_mode():
                self._cache.restart(streams, self._state.slots)
        if self._commit is not None:
            self._commit(output)

    def _padded(self, parts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Parts of streams as ids with trailing padding, int64 [B, T], and where they are valid; None if everywhere."""
        longest = max(map(len, parts))
        ids_BT = torch.tensor([[*part, *[0] * (longest - len(part))] for part in parts], device=self._device)
        if all(len(part) == longest for part in parts):
            return ids_BT, None
        length_B = torch.tensor([len(part) for part in parts], device=self._device)
        return ids_BT, torch.arange(longest, device=self._device) < length_B[:, None]


def padded_prompts(prompts: Prompts, attention_mask: Tensor | None, decoding: Decoding, *,
                   device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids int64 [B, T], padded on the left, and where they are valid, bool [B, T].

    Raises:
        ValueError: unless there is a token in every prompt, and padding leads.
    """
    if not isinstance(prompts, Tensor):
        if attention_mask is not None:
            raise ValueError("an attention_mask belongs to prompts in a tensor: lists of ids have their own lengths")
        if not all(isinstance(prompt, Sequence) and all(isinstance(i, int) for i in prompt) for prompt in prompts):
            raise ValueError("prompts must be a tensor of ids [B, T] or a list of lists of ids: "
                             f"got {str(prompts)[:60]!r}")
        rows = [list(prompt) for prompt in prompts]
        longest = max(map(len, rows), default=0)
        filler = 0 if decoding.eos_id is None else decoding.eos_id
        prompts = torch.tensor([[filler] * (longest - len(row)) + row for row in rows], device=device)
        attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    if prompts.dim() != 2 or 0 in prompts.shape or prompts.dtype not in (torch.int64, torch.int32):
        raise ValueError("prompts must be integer ids [B, T] with B >= 1 and T >= 1: "
                         f"got {prompts.dtype} {list(prompts.shape)}")
    valid_BT = torch.ones_like(prompts, dtype=torch.bool)
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise ValueError(f"attention_mask must be a tensor, bool or of 0 and 1: got {type(attention_mask).__name__}")
        if attention_mask.shape != prompts.shape or bool(((attention_mask != 0) & (attention_mask != 1)).any()):
            raise ValueError(f"attention_mask must hold 0 and 1 for each id, {list(prompts.shape)}: "
                             f"got {list(attention_mask.shape)}")
        valid_BT = attention_mask.to(prompts.device).bool()
    if bool((valid_BT[:, :-1] & ~valid_BT[:, 1:]).any()) or not bool(valid_BT[:, -1].all()):
        raise ValueError("padding must lead, and every prompt must have a token: attention_mask has a 0 after a 1, or a "
                         "row of zeros")
    return prompts.long(), valid_BT


def _check(model: MemoryLM, ids_BT: Tensor, valid_BT: Tensor, decoding: Decoding, window: int | None) -> None:
    """Refuses what does not fit the model."""
    V, longest = model.config.vocab_size, model.config.context_length
    smallest, largest = torch.stack(torch.aminmax(ids_BT[valid_BT])).tolist()
    if smallest < 0 or largest >= V:
        raise ValueError(f"prompts must hold ids in 0..{V - 1}: got {smallest}..{largest}")
    if decoding.eos_id is not None and not 0 <= decoding.eos_id < V:
        raise ValueError(f"eos_id must lie in 0..{V - 1}: got {decoding.eos_id}")
    if window is not None and not 1 <= window <= longest:
        raise ValueError(f"window must lie in 1..context_length = {longest}: got {window}")


def _check_streams(model: MemoryLM, num_streams: int, namespace_B: Tensor | None, state: StreamState | None) -> None:
    """Refuses what does not fit the prompts."""
    if namespace_B is not None and (namespace_B.dtype != torch.int64 or namespace_B.shape != (num_streams,)):
        raise ValueError(f"namespaces must be torch.int64 [{num_streams}], one for each prompt: "
                         f"got {namespace_B.dtype} {list(namespace_B.shape)}")
    if state is not None:
        if not isinstance(state, StreamState):
            raise ValueError("the state must be that of an output or of a Generation, `.state`: got "
                             f"{type(state).__name__}")
        check_state(state, model.config, num_streams)
