"""The suffixes of audio files: those that libsndfile decodes, and those that it doesn't."""

import soundfile

# libsndfile's names of formats, with their usual suffixes. RAW and XI are missing, since they don't say their sampling rate.
FORMAT_SUFFIXES = {
    "WAV": "wav wave",
    "WAVEX": "wav wavex",
    "RF64": "wav rf64",
    "FLAC": "flac",
    "OGG": "ogg oga opus",
    "MP3": "mp3 mp2 mpga",
    "AIFF": "aiff aif aifc",
    "AU": "au snd",
    "AVR": "avr",
    "CAF": "caf",  # codespell:ignore
    "HTK": "htk",
    "IRCAM": "sf ircam",
    "MAT4": "mat mat4",
    "MAT5": "mat mat5",
    "MPC2K": "mpc2k",
    "NIST": "sph nist",
    "PAF": "paf",
    "PVF": "pvf",
    "SD2": "sd2",
    "SDS": "sds",
    "SVX": "svx 8svx iff",
    "VOC": "voc",
    "W64": "w64",
    "WVE": "wve",
}
_OTHERS = (
    "3ga 3gp aa aac aax ac3 alac amr ape avi awb dff dsf dss dts eac3 f4a flv gsm m4a m4b m4p m4r m4v mka mkv mov mp4 mpc ogv pcm ra "
    "raw rm shn silk spx tta vox webm wma wmv wv xi"
)
FIRST_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
"""The suffixes that the first version read. Their ids don't depend on files with other suffixes."""
SUFFIXES = (
    *FIRST_SUFFIXES,
    *sorted(
        {f".{suffix}" for name in soundfile.available_formats() for suffix in FORMAT_SUFFIXES.get(name, "").split()}
        - set(FIRST_SUFFIXES)
    ),
)
"""Suffixes of audio files that libsndfile decodes."""
UNSUPPORTED = tuple(f".{suffix}" for suffix in _OTHERS.split() if f".{suffix}" not in SUFFIXES)
"""Suffixes of other audio and video files."""
