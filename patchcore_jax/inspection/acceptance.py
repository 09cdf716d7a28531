"""Images that are asked about before a model learns of them: nothing happens until they are accepted by name.

What is given as good is not believed without a look where it does not look good, and never left out silently.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from patchcore_jax.banks import editing

ALL = 'all'
_NAMED = 10  # images that a command can name and still be one line


@dataclasses.dataclass(frozen=True)
class Questioned:
  """An image, or a bank, that is not taken without being accepted.

  Attributes:
    name: its file, as it was given; images[3] where it was in an array.
    why: what is unusual, such as 'scores 1.2, and the threshold is 0.13'.
    score: its score, where it has one.
    nearest: name of the training image that has the most similar normal patch, where there is one.
  """

  name: str
  why: str
  score: float | None = None
  nearest: str | None = None

  @property
  def line(self) -> str:
    """One line that says what is unusual, and compared with what."""
    return f'{self.name}: {self.why}' + (
        f'; the most similar normal patch is in {self.nearest}' if self.nearest else '')


class NotAccepted(ValueError):
  """Images that would have to be accepted first; nothing was changed. The message says how to accept them.

  Attributes:
    images: the images.
    lines: a line for each, which commands print before the message. In a trace they are notes.
  """

  def __init__(self, images: Sequence[Questioned], accepted: Sequence[str] = ()):
    """Makes the error of some images, where others were accepted by these names."""
    self.images, self._accepted = tuple(images), tuple(accepted)
    names = short_names([*accepted, *(image.name for image in images)])
    left = names[len(accepted):]
    # To be copied to a shell.
    named = '' if len(names) > _NAMED or any(',' in name or not name.isprintable() for name in names) else (
        f"--accept {shlex.quote(','.join(names))}, or ")
    be, them = ('is', 'it') if len(left) == 1 else ('are', 'them')
    super().__init__(
        f'nothing was changed, because {_some(left)} {be} unlike the rest. Look at {them}, take out what is '
        f'not good, and accept what is: {named}--accept {ALL} (accept= in Python).')
    self.lines = [image.line for image in self.images]
    for line in self.lines:
      self.add_note(line)

  def __reduce__(self):
    return NotAccepted, (self.images, self._accepted)


def settle(
    questioned: Sequence[Questioned], accept: str | Sequence[str] = (), given: Iterable[str] = ()) -> None:
  """Returns where everything that is asked about was accepted, and raises otherwise.

  Args:
    questioned: what is asked about.
    accept: names, as they were given or their last parts; one string may hold several, with commas between
      them. 'all' for every one.
    given: names of all images. One that is accepted and not asked about does no harm.

  Raises:
    NotAccepted: some were not accepted.
    ValueError: a name of none of them, or one that several have.

  >>> settle([Questioned('new/a.png', 'scores 3, and the threshold is 2')], 'a.png')
  >>> settle([Questioned('new/a.png', 'scores 3, and the threshold is 2')])
  Traceback (most recent call last):
    ...
  patchcore_jax.inspection.acceptance.NotAccepted: nothing was changed, because a.png is unlike ...
  """
  names = list(dict.fromkeys(image.name for image in questioned))
  accepted, known = set(), [*names, *dict.fromkeys(set(given).difference(names))]
  for text in [accept] if isinstance(accept, str) else accept:
    if text == ALL:
      accepted.update(names)
      continue
    # A name may have a comma in it.
    for name in [text] if editing.positions(text, known) else filter(None, text.split(',')):
      accepted.add(_found(name, names, known))
  if left := [image for image in questioned if image.name not in accepted]:
    raise NotAccepted(left, [name for name in names if name in accepted])


def short_names(names: Sequence[str]) -> list[str]:
  """Shortens names to as many of their last parts as tell them apart.

  >>> short_names(['new/a.png', 'new/b/c.png', 'new/d/c.png'])
  ['a.png', 'b/c.png', 'd/c.png']
  """
  different, result = list(dict.fromkeys(names)), []
  for name in names:
    parts = PurePath(name).parts
    ends = (str(PurePath(*parts[-n:])) for n in range(1, len(parts)))
    result.append(next((end for end in ends if len(editing.positions(end, different)) == 1), name))
  return result


def _found(name: str, names: Sequence[str], known: Sequence[str]) -> str:
  """Finds the whole name of what is accepted: of those asked about (`names`), or else of all known ones."""
  among = names if editing.positions(name, names) else known
  if not among:
    raise ValueError(f'Nothing is asked about, and {name} was accepted: leave it out, or look at its name.')
  asked = f'Asked about: {_some(short_names(names))}.' if names else 'Nothing is asked about.'
  return among[editing.position(name, among, f'There is no image {name!r} to accept', asked)]


def _some(names: Sequence[str]) -> str:
  """Lists the first of some names, and says how many more there are."""
  more = len(names) - _NAMED
  return ', '.join(names[:_NAMED]) + (f' and {more} more' if more > 0 else '')
