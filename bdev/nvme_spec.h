/*
 * The structures and numbers of the NVM Express Base Specification 2.0 and the NVM Command Set
 * Specification 1.0 that the driver uses. Everything is little-endian, as is every machine we run on.
 */
#ifndef BDEV_NVME_SPEC_H
#define BDEV_NVME_SPEC_H

#include <stdint.h>

/* cffi: begin */
/* Controller properties (Base 3.1.3): offsets in BAR 0. */
#define NVME_REG_CAP 0x00
#define NVME_REG_VS 0x08
#define NVME_REG_CC 0x14
#define NVME_REG_CSTS 0x1c
#define NVME_REG_AQA 0x24
#define NVME_REG_ASQ 0x28
#define NVME_REG_ACQ 0x30
#define NVME_REG_DOORBELLS 0x1000

#define NVME_CC_ENABLE 0x1
#define NVME_CC_SHUTDOWN_NORMAL 0x4000
#define NVME_CC_SHUTDOWN_MASK 0xc000
#define NVME_CC_ENTRY_SIZES 0x460000 /* IOCQES 4, IOSQES 6: entries of 16 and 64 bytes */

#define NVME_CSTS_READY 0x1
#define NVME_CSTS_FATAL 0x2
#define NVME_CSTS_SHUTDOWN_MASK 0xc
#define NVME_CSTS_SHUTDOWN_DONE 0x8

#define NVME_PAGE_SIZE 4096 /* CC.MPS 0 */

/* Submission queue entry (Base 3.3.3.1). */
struct nvme_command {
	uint8_t opcode;
	uint8_t flags; /* FUSE, PSDT */
	uint16_t cid;
	uint32_t nsid;
	uint32_t cdw2;
	uint32_t cdw3;
	uint64_t metadata;
	uint64_t prp1; /* or the first half of the SGL descriptor */
	uint64_t prp2;
	uint32_t cdw10;
	uint32_t cdw11;
	uint32_t cdw12;
	uint32_t cdw13;
	uint32_t cdw14;
	uint32_t cdw15;
};

/* Completion queue entry (Base 3.3.3.2). */
struct nvme_completion {
	uint32_t result;
	uint32_t result_high;
	uint16_t sq_head;
	uint16_t sq_id;
	uint16_t cid;
	uint16_t status; /* bit 0: phase; 8:1 code; 11:9 code type; 15: do not retry */
};

enum nvme_admin_opcode {
	NVME_ADMIN_DELETE_SQ = 0x00,
	NVME_ADMIN_CREATE_SQ = 0x01,
	NVME_ADMIN_GET_LOG_PAGE = 0x02,
	NVME_ADMIN_DELETE_CQ = 0x04,
	NVME_ADMIN_CREATE_CQ = 0x05,
	NVME_ADMIN_IDENTIFY = 0x06,
	NVME_ADMIN_ABORT = 0x08,
	NVME_ADMIN_SET_FEATURES = 0x09,
	NVME_ADMIN_ASYNC_EVENT = 0x0c,
	NVME_ADMIN_DOORBELL_BUFFER = 0x7c,
};

enum nvme_opcode {
	NVME_FLUSH = 0x00,
	NVME_WRITE = 0x01,
	NVME_READ = 0x02,
	NVME_COMPARE = 0x05,
	NVME_WRITE_ZEROES = 0x08,
	NVME_DATASET_MANAGEMENT = 0x09,
	NVME_VERIFY = 0x0c,
	NVME_COPY = 0x19,
};

/* Identify Controller (Base figure 275). */
struct nvme_identify_controller {
	uint16_t vid;
	uint16_t ssvid;
	uint8_t serial[20];
	uint8_t model[40];
	uint8_t firmware[8];
	uint8_t rab;
	uint8_t ieee[3];
	uint8_t cmic;
	uint8_t mdts; /* largest transfer: 2^mdts pages of CAP.MPSMIN; 0: no limit */
	uint16_t cntlid;
	uint32_t ver;
	uint32_t rtd3r;
	uint32_t rtd3e;
	uint32_t oaes; /* asynchronous events that it can send */
	uint32_t ctratt;
	uint8_t reserved100[11];
	uint8_t cntrltype; /* 1: I/O controller; 0 before version 1.4 */
	uint8_t reserved112[144];
	uint16_t oacs; /* bit 8: doorbell buffer config */
	uint8_t acl;
	uint8_t aerl;
	uint8_t frmw;
	uint8_t lpa;
	uint8_t reserved262[250];
	uint8_t sqes;
	uint8_t cqes;
	uint16_t maxcmd;
	uint32_t nn;
	uint16_t oncs; /* bit 0: compare; 2: dataset management; 3: write zeroes; 7: verify; 8: copy */
	uint16_t fuses;
	uint8_t fna;
	uint8_t vwc; /* bit 0: a volatile write cache is present */
	uint8_t reserved526[8];
	uint16_t ocfs; /* bit 0: copy takes source ranges of format 0 */
	uint32_t sgls; /* 1:0: 0 none, 1 any alignment, 2 four bytes */
	uint8_t reserved540[228];
	uint8_t subnqn[256];
	uint8_t reserved1024[3072];
};

struct nvme_lba_format {
	uint16_t metadata_size;
	uint8_t data_size; /* 2^data_size bytes a block */
	uint8_t performance;
};

/* Identify Namespace (NVM Command Set figure 97). */
struct nvme_identify_namespace {
	uint64_t size;	   /* blocks */
	uint64_t capacity; /* blocks */
	uint64_t used;
	uint8_t features;
	uint8_t formats; /* number of formats, less 1 */
	uint8_t format;	 /* 3:0 and 6:5: the index of the one in use */
	uint8_t mc;
	uint8_t dpc;
	uint8_t dps;
	uint8_t nmic;
	uint8_t rescap;
	uint8_t fpi;
	uint8_t dlfeat;
	uint8_t reserved34[40];
	uint16_t mssrl; /* blocks that a source range of a copy has at most */
	uint32_t mcl;	/* blocks that a copy has at most */
	uint8_t msrc;	/* source ranges that a copy has at most, less 1 */
	uint8_t reserved81[18];
	uint8_t nsattr; /* bit 0: write protected now */
	uint8_t reserved100[4];
	uint8_t nguid[16];
	uint8_t eui64[8];
	struct nvme_lba_format lba_formats[64];
	uint8_t reserved384[3712];
};

/* SMART / Health Information log page (Base figure 207); counters of 16 bytes, little-endian. */
struct nvme_health_log {
	uint8_t critical_warning;
	uint8_t temperature[2]; /* kelvin */
	uint8_t available_spare;
	uint8_t available_spare_threshold;
	uint8_t percentage_used;
	uint8_t reserved6[26];
	uint8_t data_units_read[16];
	uint8_t data_units_written[16];
	uint8_t host_read_commands[16];
	uint8_t host_write_commands[16];
	uint8_t controller_busy_time[16];
	uint8_t power_cycles[16];
	uint8_t power_on_hours[16];
	uint8_t unsafe_shutdowns[16];
	uint8_t media_errors[16];
	uint8_t error_log_entries[16];
	uint32_t warning_temperature_time;
	uint32_t critical_temperature_time;
	uint8_t reserved200[312];
};
/* cffi: end */

/* Commands: PSDT 01b says that prp1 and prp2 hold an SGL descriptor (Base figure 88). */
#define NVME_USES_SGL 0x40

/* SGL descriptor (Base figure 95). */
struct nvme_sgl {
	uint64_t address;
	uint32_t length;
	uint8_t reserved[3];
	uint8_t type;
};

#define NVME_SGL_DATA 0x00
#define NVME_SGL_SEGMENT 0x20
#define NVME_SGL_LAST_SEGMENT 0x30

/* Dataset Management (NVM Command Set figure 40). */
struct nvme_range {
	uint32_t attributes;
	uint32_t blocks;
	uint64_t first;
};

/* Copy, source range of format 0 (NVM Command Set figure 37). */
struct nvme_source {
	uint64_t reserved0;
	uint64_t first;
	uint16_t blocks; /* less 1 */
	uint8_t reserved18[14];
};

#define NVME_DSM_DEALLOCATE 0x4
#define NVME_RW_FUA (1U << 30)
#define NVME_ZEROES_DEALLOCATE (1U << 25)

/* The status field without its phase bit (Base 3.3.3.2.1): code type << 8 | code, and what stands above. */
#define NVME_STATUS(field) (((field) >> 1) & 0x7ff)
#define NVME_STATUS_DO_NOT_RETRY(field) ((field)&0x8000)

enum nvme_status {
	NVME_SUCCESS = 0x000,
	NVME_INVALID_OPCODE = 0x001,
	NVME_INVALID_FIELD = 0x002,
	NVME_INVALID_NAMESPACE = 0x00b,
	NVME_WRITE_PROTECTED = 0x020,
	NVME_LBA_OUT_OF_RANGE = 0x080,
	NVME_CAPACITY_EXCEEDED = 0x081,
	NVME_RESERVATION_CONFLICT = 0x083,
	NVME_READ_ONLY_RANGE = 0x182,
	NVME_WRITE_FAULT = 0x280,
	NVME_UNRECOVERED_READ = 0x281,
	NVME_GUARD_ERROR = 0x282,
	NVME_APPLICATION_TAG_ERROR = 0x283,
	NVME_REFERENCE_TAG_ERROR = 0x284,
	NVME_COMPARE_FAILURE = 0x285,
	NVME_ACCESS_DENIED = 0x286,
};

#define NVME_ASSERT_SIZE(type, bytes) _Static_assert(sizeof(struct type) == (bytes), #type)
#define NVME_ASSERT_PLACE(type, member, at)                                                                    \
	_Static_assert(__builtin_offsetof(struct type, member) == (at), #type "." #member)

NVME_ASSERT_SIZE(nvme_command, 64);
NVME_ASSERT_SIZE(nvme_completion, 16);
NVME_ASSERT_SIZE(nvme_sgl, 16);
NVME_ASSERT_SIZE(nvme_range, 16);
NVME_ASSERT_SIZE(nvme_source, 32);
NVME_ASSERT_PLACE(nvme_source, blocks, 16);
NVME_ASSERT_SIZE(nvme_identify_controller, 4096);
NVME_ASSERT_PLACE(nvme_identify_controller, mdts, 77);
NVME_ASSERT_PLACE(nvme_identify_controller, oaes, 92);
NVME_ASSERT_PLACE(nvme_identify_controller, cntrltype, 111);
NVME_ASSERT_PLACE(nvme_identify_controller, oacs, 256);
NVME_ASSERT_PLACE(nvme_identify_controller, sqes, 512);
NVME_ASSERT_PLACE(nvme_identify_controller, oncs, 520);
NVME_ASSERT_PLACE(nvme_identify_controller, vwc, 525);
NVME_ASSERT_PLACE(nvme_identify_controller, ocfs, 534);
NVME_ASSERT_PLACE(nvme_identify_controller, sgls, 536);
NVME_ASSERT_PLACE(nvme_identify_controller, subnqn, 768);
NVME_ASSERT_SIZE(nvme_identify_namespace, 4096);
NVME_ASSERT_PLACE(nvme_identify_namespace, dlfeat, 33);
NVME_ASSERT_PLACE(nvme_identify_namespace, mssrl, 74);
NVME_ASSERT_PLACE(nvme_identify_namespace, mcl, 76);
NVME_ASSERT_PLACE(nvme_identify_namespace, nguid, 104);
NVME_ASSERT_PLACE(nvme_identify_namespace, lba_formats, 128);
NVME_ASSERT_SIZE(nvme_health_log, 512);
NVME_ASSERT_PLACE(nvme_health_log, data_units_read, 32);
NVME_ASSERT_PLACE(nvme_health_log, warning_temperature_time, 192);

#endif
