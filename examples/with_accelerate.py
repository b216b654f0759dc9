"""CA-CL in a loop of accelerate's, on drawn scenes: no download, no GPU, some seconds."""

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from cacl import BackgroundSet, CACLLoss, CAMNet, load_encoder, scenes
from cacl.transforms import normalize

torch.manual_seed(0)
drawn = [scenes.draw(np.random.default_rng(i), 96) for i in range(32)]
images = [normalize(torch.from_numpy(np.array(scene.image)).permute(2, 0, 1)) for scene in drawn]
labels = torch.tensor([[name in scene.classes for name in scenes.CLASSES] for scene in drawn])
loader = DataLoader(list(zip(images, labels, strict=True)), batch_size=8, shuffle=True)

accelerator = Accelerator()
net = CAMNet(len(scenes.CLASSES), backbone="scenes")
encoder = load_encoder("scenes", device=accelerator.device)
criterion = CACLLoss(encoder, scenes.CLASSES, backgrounds=BackgroundSet(scenes.BACKGROUNDS))
optimizer = torch.optim.SGD(net.parameter_groups(5e-4), momentum=0.9)
net, optimizer = accelerator.prepare(net, optimizer)
loader = accelerator.prepare_data_loader(loader, device_placement=False)  # labels stay on the CPU: no step waits
for epoch in range(4):
    total = torch.zeros((), device=accelerator.device)
    for images, labels in loader:
        images = images.to(accelerator.device)
        loss = criterion(images, net(images).cams, labels).total
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        total += loss.detach() / len(loader)
    accelerator.print(f"epoch {epoch}  loss {accelerator.reduce(total, 'mean').item():.2f}")
