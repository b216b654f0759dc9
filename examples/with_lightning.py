"""CA-CL in a module of Lightning's, on drawn scenes: no download, no GPU, some seconds."""

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from cacl import BackgroundSet, CACLLoss, CAMNet, load_encoder, scenes
from cacl.transforms import normalize


class Training(lightning.LightningModule):
    def __init__(self, names):
        super().__init__()
        self.net = CAMNet(len(names), backbone="scenes")
        self.criterion = CACLLoss(load_encoder("scenes"), names, backgrounds=BackgroundSet(scenes.BACKGROUNDS))

    def training_step(self, batch, index):
        terms = self.criterion(batch[0], self.net(batch[0]).cams, batch[1])
        self.log("loss", terms.total, on_step=False, on_epoch=True, sync_dist=True)
        return terms.total

    def on_train_epoch_end(self):
        self.print(f"epoch {self.current_epoch}  loss {self.trainer.callback_metrics['loss']:.2f}")

    def transfer_batch_to_device(self, batch, device, dataloader):
        return batch[0].to(device), batch[1]  # labels stay on the CPU, so that no step waits for the device

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameter_groups(5e-4), momentum=0.9)


lightning.seed_everything(0)
drawn = [scenes.draw(np.random.default_rng(i), 96) for i in range(32)]
images = [normalize(torch.from_numpy(np.array(scene.image)).permute(2, 0, 1)) for scene in drawn]
labels = torch.tensor([[name in scene.classes for name in scenes.CLASSES] for scene in drawn])
trainer = lightning.Trainer(max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Training(scenes.CLASSES), DataLoader(list(zip(images, labels, strict=True)), batch_size=8, shuffle=True))
