"""The nodes: each a schema and one call into ``host``."""

from comfy_api.latest import ComfyExtension, io

from ..host.folders import register_folders
from ..host.live import PACK, register_routes, warn_of_name
from .augment import AugmentImages
from .benchmark import BenchmarkModel
from .bnb import BitsandbytesQuantize
from .calibrate import CalibrateInt8
from .check import CheckQuantizedModel
from .checkpoint import LoadQuantizedUNet, SaveForStock, SaveQuantizedUNet
from .diffusers_unet import LoadDiffusersUNet
from .export import ExportUNet
from .int8 import DynamicInt8
from .layer_times import LayerTimesNode
from .lora import LoadLora, MergeLora, SaveLora
from .lora_train import LoraTrain
from .pareto import ParetoFront
from .quality import CompareImages, ImageSetQuality
from .quantize import QuantizeUNet
from .report import SaveReport
from .scales import ApplyScales, LoadScales, SaveScales
from .sensitivity import BitPlanNode, LayerSensitivity
from .starter import LoadStarterModel
from .train_qat import TrainQat
from .train_scales import TrainScales
from .training_images import ClassImagesNode, TrainingImagesNode
from .upscale import Upscale4x
from .upscaler import LoadUpscaler
from .weight_change_map import WeightChangeMap


class QuantTuneExtension(ComfyExtension):
    """Everything ComfyUI shows under the category QuantTune."""

    async def on_load(self) -> None:
        register_folders()
        register_routes()
        warn_of_name(PACK)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadStarterModel, QuantizeUNet, SaveQuantizedUNet, LoadQuantizedUNet, ApplyScales,
                LoadScales, SaveScales, TrainingImagesNode, ClassImagesNode, TrainScales,
                LoraTrain, LoadLora, SaveLora, MergeLora, AugmentImages, WeightChangeMap,
                DynamicInt8, SaveForStock, CalibrateInt8, TrainQat, LayerSensitivity, BitPlanNode,
                BenchmarkModel, CheckQuantizedModel, CompareImages, ImageSetQuality, ParetoFront,
                LayerTimesNode, SaveReport, LoadUpscaler, Upscale4x, LoadDiffusersUNet, ExportUNet,
                BitsandbytesQuantize]
