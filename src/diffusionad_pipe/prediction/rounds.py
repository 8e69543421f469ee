"""Rounds of predictions into one folder, by one process or by several that share the pictures."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..files.output_folder import OutputFolder
from ..images.sources import ImageSource
from ..pipeline_diffusionad import DiffusionADPipeline
from ..runtime.progress import ProgressBar
from .folder import PredictionFolder, Row, append_share, even_shares
from .predict import predict_images
from .settings import PredictionSettings


class PredictionRun(NamedTuple):
    """All that the rounds have in common.

    Args:
        pipe: with its thresholds and tiling.
        settings: of the run.
        folder: that it writes into.
        results: of the main process; None in the others.
    """

    pipe: DiffusionADPipeline
    settings: PredictionSettings
    folder: OutputFolder
    results: PredictionFolder | None

    def predict_rounds(
        self,
        rounds: Iterable[Sequence[ImageSource]],
        begun: Callable[[Sequence[ImageSource], Sequence[ImageSource]], None],
        done: Callable[[Row], None] | None = None,
    ) -> None:
        """Predict what is not done yet of each round, and write the tables' rows as they come.

        Args:
            rounds: of pictures, which all processes find alike.
            begun: told the pictures of a round, and those of them that are to be predicted.
            done: told each row, in place of a progress bar; the tables are then written after each round.
        """
        state = PartialState()
        for found in rounds:
            todo, names = found, {}
            if self.results is not None:
                todo = [source for source in found if not self.results.is_done(source)]
                names = self.results.name_outputs(todo)
            if state.num_processes > 1:
                # All have found the same, but the others may see drawings that are already being written anew.
                wanted, names = broadcast_object_list([{source.name for source in todo}, names])
                todo = [source for source in found if source.name in wanted]
            begun(found, todo)
            if todo:
                self._predict_share(todo, names, done)
            if done is not None and todo and self.results is not None:
                self.results.write_tables(int(self.settings.parquet))
        state.wait_for_everyone()
        if self.results is not None:
            self.results.take_shares()

    def _predict_share(
        self, sources: Sequence[ImageSource], names: dict[str, str], done: Callable[[Row], None] | None
    ) -> None:
        """Predict this process's share of the pictures.

        Batches are the same for any number of processes, since in batches of other sizes the last bits of scores
        differ.
        """
        state, size = PartialState(), self.settings.batch_size
        batches = even_shares(-(-len(sources) // size), state.num_processes)[state.process_index]
        share = sources[batches.start * size : batches.stop * size]
        store = partial(append_share, self.folder, state.process_index) if self.results is None else self.results.add
        with ProgressBar(len(share), "predicting", "picture", shown=state.is_main_process and done is None) as bar:
            for rows in predict_images(self.pipe, share, names, self.folder, self.settings):
                store(rows)
                bar.update(len(rows))
                if done is not None:
                    for row in rows:
                        done(row)
