#include <errno.h>

#include "bdev/cow_copy.h"

void cow_fill(struct cow_bdev *cow)
{
	struct cow_fill *fill = &cow->fill;

	if (!fill->active) {
		return;
	}
	while (fill->next < fill->end && !fill->status && cow->free_count > COW_COPIES / 2) {
		uint64_t cluster = cow_map_find(cow->map, fill->next, fill->end, false);

		fill->next = cluster + 1;
		if (cow->stacked.bdev.removed) {
			fill->status = -ENODEV;
		} else if (cluster < fill->end && owned_take(cow_map_claim(cow->map, cluster), cow->owner)) {
			if (cow_map_has(cow->map, cluster)) {
				owned_release(cow_map_claim(cow->map, cluster));
				continue;
			}
			fill->pending++;
			cow_copy_run(cow_copy_take(cow, cluster, NULL));
		}
	}
	if (!fill->pending && (fill->next >= fill->end || fill->status)) {
		struct bdev *bdev = &cow->stacked.bdev;

		fill->active = false;
		reactor_notify(bdev->reactor, fill->id, NOTICE_DRAINED, fill->status, "filled");
		bdev_release(bdev);
	}
}

int cow_fill_start(struct bdev *bdev, uint64_t id, uint64_t first, uint64_t end)
{
	struct cow_bdev *cow = (struct cow_bdev *)bdev;

	if (bdev->removed) {
		return -ENODEV;
	}
	if (cow->fill.active) {
		return -EBUSY;
	}
	end = end < cow->map->layout.clusters ? end : cow->map->layout.clusters;
	cow->fill = (struct cow_fill){.id = id, .next = first, .end = end, .active = true};
	bdev_hold(bdev);
	cow_defer(cow);
	return 0;
}
